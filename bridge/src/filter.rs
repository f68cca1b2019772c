//! What a sink is to have: by topic, by CloudEvents type, by lane. Pure.
//!
//! Owns: [`Filter`], and the matching of MQTT topic filters (MQTT 5, 4.7).
//! Invariant: an empty list asks for nothing, so that a sink without filters has everything.
//! Deliberately absent: what becomes of an event that is not wanted (`streams`).

use storage::{Event, Lanes};

/// What a sink is to have.
#[derive(Clone, Debug)]
pub struct Filter {
    /// One of these must match the topic.
    pub topics: Vec<TopicFilter>,
    /// One of these must be the CloudEvents type.
    pub event_types: Vec<String>,
    /// The lane must be in here.
    pub lanes: Lanes,
}

impl Default for Filter {
    fn default() -> Self {
        Self { topics: Vec::new(), event_types: Vec::new(), lanes: Lanes::ALL }
    }
}

impl Filter {
    /// Whether it lets everything through.
    pub(crate) fn is_open(&self) -> bool {
        self.topics.is_empty() && self.event_types.is_empty() && self.lanes == Lanes::ALL
    }

    /// Whether the sink is to have an event; `event_type` is its type if the route named none.
    pub(crate) fn wants(&self, event: &Event, event_type: &str) -> bool {
        if self.is_open() {
            return true;
        }
        let of_type = || {
            let event_type = event.attributes.event_type().unwrap_or(event_type);
            self.event_types.iter().any(|wanted| wanted == event_type)
        };
        (self.topics.is_empty() || self.topics.iter().any(|topic| topic.matches(&event.topic)))
            && (self.event_types.is_empty() || of_type())
            && (self.lanes == Lanes::ALL || self.lanes.contains(event.attributes.lane()))
    }
}

/// An MQTT topic filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicFilter(String);

/// Why a text is no topic filter; says what would be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopicFilterError {
    /// Nothing there, or more than MQTT allows.
    #[error("a topic filter has 1 to 65535 bytes, and no U+0000")]
    Length,
    /// `#` that is not the last level.
    #[error("'#' must be the whole last level, as in \"alarms/#\"")]
    Rest,
    /// `+` beside other characters.
    #[error("'+' must be a whole level, as in \"devices/+/alarm\"")]
    Any,
}

impl TopicFilter {
    /// Reads a filter.
    ///
    /// # Errors
    /// See [`TopicFilterError`].
    pub fn parse(text: &str) -> Result<Self, TopicFilterError> {
        if text.is_empty() || text.len() > usize::from(u16::MAX) || text.contains('\0') {
            return Err(TopicFilterError::Length);
        }
        let mut levels = text.split('/').peekable();
        while let Some(level) = levels.next() {
            if level.contains('#') && (level != "#" || levels.peek().is_some()) {
                return Err(TopicFilterError::Rest);
            }
            if level.contains('+') && level != "+" {
                return Err(TopicFilterError::Any);
            }
        }
        Ok(Self(text.to_owned()))
    }

    /// Whether it matches a topic. A wildcard in the first level matches no topic that begins with
    /// `$` [MQTT-4.7.2-1].
    fn matches(&self, topic: &str) -> bool {
        if topic.starts_with('$') && self.0.starts_with(['+', '#']) {
            return false;
        }
        let mut levels = topic.split('/');
        for wanted in self.0.split('/') {
            // It also matches its parent, where no level of the topic is left.
            if wanted == "#" {
                return true;
            }
            match levels.next() {
                Some(level) if wanted == "+" || wanted == level => {}
                _ => return false,
            }
        }
        levels.next().is_none()
    }
}

#[cfg(test)]
mod tests {
    use storage::{Attribute, Attributes, Lane};

    use super::*;
    use crate::fake;

    #[test]
    fn topic_filters_match_as_mqtt_says() {
        for (filter, topic, expected) in [
            ("a/b", "a/b", true),
            ("a/b", "a/b/c", false),
            ("a/b/c", "a/b", false),
            ("a/+", "a/b", true),
            ("a/+", "a", false),
            ("a/+/c", "a//c", true),
            ("a/#", "a", true),
            ("a/#", "a/b/c", true),
            ("a/#", "ab", false),
            ("#", "é/x", true),
            ("#", "$SYS/x", false),
            ("+/x", "$SYS/x", false),
            ("$SYS/#", "$SYS/x", true),
            ("/", "/", true),
            ("/+", "/", true),
        ] {
            assert_eq!(
                TopicFilter::parse(filter).unwrap().matches(topic),
                expected,
                "{filter} {topic}"
            );
        }
        for (text, error) in [
            ("", TopicFilterError::Length),
            ("a\0", TopicFilterError::Length),
            ("a/#/b", TopicFilterError::Rest),
            ("a#", TopicFilterError::Rest),
            ("a/b+", TopicFilterError::Any),
        ] {
            assert_eq!(TopicFilter::parse(text), Err(error), "{text:?}");
        }
    }

    #[test]
    fn every_kind_of_filter_must_be_content() {
        let event = |topic: &str, attributes: &[Attribute<'static>]| Event {
            topic: topic.into(),
            attributes: Attributes::encode(attributes.iter().cloned()),
            ..fake::event("d", "1")
        };
        let plain = event("a/x", &[]);
        assert!(Filter::default().wants(&plain, "T"));
        let by_type = Filter { event_types: vec!["T".into(), "U".into()], ..Filter::default() };
        assert!(by_type.wants(&plain, "T") && !by_type.wants(&plain, "V"));
        assert!(by_type.wants(&event("a/x", &[Attribute::EventType("U")]), "V"));
        assert!(!by_type.wants(&event("a/x", &[Attribute::EventType("V")]), "T"));
        let by_lane = Filter { lanes: Lanes::NONE.with(Lane::Alarm), ..Filter::default() };
        assert!(!by_lane.wants(&plain, "T"));
        let alarm = event("b/x", &[Attribute::Lane(Lane::Alarm)]);
        assert!(by_lane.wants(&alarm, "T"));
        let topics = vec![TopicFilter::parse("a/#").unwrap()];
        let both = Filter { topics, ..by_lane };
        assert!(!both.wants(&alarm, "T") && !both.wants(&plain, "T"));
        assert!(both.wants(&event("a", &[Attribute::Lane(Lane::Alarm)]), "T"));
    }
}
