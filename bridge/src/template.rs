//! A topic upstream, made from an event.
//!
//! | in braces | becomes |
//! | --- | --- |
//! | `{topic}` | the topic it was published to |
//! | `{1}`, `{2}` ... | that level of the topic; nothing where it has none |
//! | `{device}` | the device key |
//! | `{gateway}` | the id of this gateway |
//! | `{type}` | the route's `event_type`, else the sink's |
//!
//! Owns: reading the template, and filling it in.
//! Deliberately absent: what an upstream takes for a topic (each sink).

use storage::Event;

use crate::cloudevents::Envelope;

/// Longest template in bytes.
const TEMPLATE_BYTES_MAX: usize = 1024;

/// A topic with places to fill in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Topic,
    /// From 0.
    Level(usize),
    Device,
    Gateway,
    Type,
}

impl Template {
    /// Reads a template.
    ///
    /// # Errors
    /// What is wrong with it, and what would be right.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() || text.len() > TEMPLATE_BYTES_MAX {
            return Err(format!("must be 1 to {TEMPLATE_BYTES_MAX} bytes long"));
        }
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            let Some((name, after)) = after.split_once('}') else {
                return Err("has a { without its }".to_owned());
            };
            if !before.is_empty() {
                parts.push(Part::Text(before.to_owned()));
            }
            parts.push(match name {
                "topic" => Part::Topic,
                "device" => Part::Device,
                "gateway" => Part::Gateway,
                "type" => Part::Type,
                _ => match name.parse::<usize>() {
                    Ok(number @ 1..=128) => Part::Level(number - 1),
                    _ => {
                        return Err(format!(
                            "has {{{name}}}; known are {{topic}}, {{device}}, {{gateway}}, {{type}}, \
                             and {{1}} for the first level of the topic, up to {{128}}"
                        ));
                    }
                },
            });
            rest = after;
        }
        if rest.contains('}') {
            return Err("has a } without its {".to_owned());
        }
        if !rest.is_empty() {
            parts.push(Part::Text(rest.to_owned()));
        }
        Ok(Self(parts))
    }

    /// Its own text, without what is filled in.
    pub fn literals(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|part| match part {
            Part::Text(text) => Some(&**text),
            _ => None,
        })
    }

    /// The topic of an event.
    pub(crate) fn fill(&self, event: &Event, envelope: &Envelope) -> String {
        let mut topic = String::new();
        for part in &self.0 {
            topic.push_str(match part {
                Part::Text(text) => text,
                Part::Topic => &event.topic,
                Part::Level(number) => event.topic.split('/').nth(*number).unwrap_or(""),
                Part::Device => &event.device_key,
                Part::Gateway => envelope.gateway(),
                Part::Type => envelope.event_type(event),
            });
        }
        topic
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake;

    #[test]
    fn every_place_is_filled_in() {
        let envelope = Envelope::new(&fake::origin(), "reading");
        let event = fake::event("dev-1", "x");
        for (template, topic) in [
            ("{topic}", "devices/dev-1/t"),
            ("plant/{gateway}/{2}/{3}", "plant/edge-01/dev-1/t"),
            ("{device}.{type}", "dev-1.reading"),
            ("{9}x", "x"),
            ("plain", "plain"),
        ] {
            assert_eq!(Template::parse(template).unwrap().fill(&event, &envelope), topic);
        }
    }

    #[test]
    fn a_mistake_is_told() {
        for (template, told) in [
            ("", "1 to 1024"),
            ("a/{device", "without its }"),
            ("a}", "without its {"),
            ("{devcie}", "{devcie}"),
            ("{0}", "{0}"),
            ("{129}", "{129}"),
        ] {
            let wrong = Template::parse(template).unwrap_err();
            assert!(wrong.contains(told), "{template}: {wrong}");
        }
    }
}
