//! Which device an event belongs to: from the topic by a route's filter, else the client id; or from
//! where the route says ([`DeviceFrom`]), which the connection knows.
//!
//! Owns: the syntax of `route.filter` ([`RouteFilter`]) and the choice among routes ([`Routes`]).
//! A filter is an MQTT topic filter (MQTT 5, 4.7) in which one level may be `{device}`: it matches
//! like `+`, except that it must not be empty, because an empty key would be everybody's.
//! Deliberately absent: whether a topic is valid at all, which the front checks before.

use bytestring::ByteString;
use storage::Lane;

use super::event_id::EventIdFrom;
use crate::config::{RouteConfig, RouteLimits};
use crate::mqtt::pace::Rate;

/// What the topic said about an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved<'a> {
    /// The identity within which order holds: a slice of the topic, or the client id.
    pub device_key: ByteString,
    /// The route's media type, for payloads that name none themselves.
    pub content_type: Option<&'a str>,
    /// The route's CloudEvents type.
    pub event_type: Option<&'a str>,
    /// The route's lane.
    pub lane: Lane,
    /// Where the route says that the device key stands.
    pub device: &'a DeviceFrom,
    /// Where the route says that an event's own id stands.
    pub event_id: Option<&'a EventIdFrom>,
    /// Which route it is: its place in the configuration.
    pub route: usize,
    /// What may come over the route.
    pub limits: RouteLimits,
}

/// Where a device key stands. What has none there goes under the client id.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DeviceFrom {
    /// In the topic, where the filter has `{device}`.
    #[default]
    Topic,
    /// In CONNECT.
    ClientId,
    /// The user that the client has logged in as.
    Username,
    /// The user in the client's certificate.
    Certificate,
    /// A user property of each publish, of this name (MQTT 5).
    Property(String),
}

impl DeviceFrom {
    /// Reads `route.device`.
    ///
    /// # Errors
    /// What would be right.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "topic" => Ok(Self::Topic),
            "client_id" => Ok(Self::ClientId),
            "username" => Ok(Self::Username),
            "certificate" => Ok(Self::Certificate),
            _ => match text.strip_prefix("property:") {
                Some(name) if !name.is_empty() => Ok(Self::Property(name.to_owned())),
                _ => Err(format!(
                    "must be \"topic\", \"client_id\", \"username\", \"certificate\" or \
                     \"property:NAME\", not {text:?}"
                )),
            },
        }
    }
}

/// The routes in the order in which they are tried; the first that matches decides.
#[derive(Clone, Debug, Default)]
pub struct Routes(Vec<Route>);

#[derive(Clone, Debug)]
struct Route {
    filter: RouteFilter,
    content_type: Option<String>,
    event_type: Option<String>,
    lane: Lane,
    device: DeviceFrom,
    event_id: Option<EventIdFrom>,
    limits: RouteLimits,
}

impl Routes {
    /// Reads the filters. No routes at all accept every topic, with the client id as device key.
    ///
    /// # Errors
    /// The first filter that is wrong, with what would be right.
    pub fn new(routes: &[RouteConfig]) -> Result<Self, RouteFilterError> {
        let route = |config: &RouteConfig| {
            let filter = RouteFilter::parse(&config.filter)?;
            let RouteConfig { content_type, device, event_id, event_type, lane, limits, .. } =
                config.clone();
            Ok(Route { filter, content_type, event_type, lane, device, event_id, limits })
        };
        routes.iter().map(route).collect::<Result<_, _>>().map(Self)
    }

    /// Whether any route says where an event's own id stands.
    pub fn knows_ids(&self) -> bool {
        self.0.iter().any(|route| route.event_id.is_some())
    }

    /// Whether any route limits how fast a client may publish.
    pub fn limit_rates(&self) -> bool {
        self.0.iter().any(|route| route.limits.client_rate != Rate::default())
    }

    /// Where the id of an event on this topic stands.
    pub fn event_id(&self, topic: &ByteString) -> Option<&EventIdFrom> {
        self.resolve(topic, &ByteString::new())?.event_id
    }

    /// The device key and defaults of a publish; `None` if no route accepts the topic.
    pub fn resolve(&self, topic: &ByteString, client_id: &ByteString) -> Option<Resolved<'_>> {
        if self.0.is_empty() {
            return Some(Resolved {
                device_key: client_id.clone(),
                content_type: None,
                device: &DeviceFrom::ClientId,
                event_id: None,
                event_type: None,
                lane: Lane::default(),
                route: 0,
                limits: RouteLimits::default(),
            });
        }
        self.0.iter().enumerate().find_map(|(at, route)| {
            let device_key = route.filter.device_key(topic, client_id)?;
            Some(Resolved {
                device_key,
                content_type: route.content_type.as_deref(),
                device: &route.device,
                event_id: route.event_id.as_ref(),
                event_type: route.event_type.as_deref(),
                lane: route.lane,
                route: at,
                limits: route.limits,
            })
        })
    }
}

/// A parsed `route.filter`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteFilter(Vec<Level>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Level {
    /// The level as written.
    Exactly(String),
    /// `+`: any one level.
    Any,
    /// `{device}`: any one level that is not empty, which becomes the device key.
    Device,
    /// `#`: the parent level and everything below.
    Rest,
}

/// Why a `route.filter` is wrong; each text says what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RouteFilterError {
    /// Nothing there.
    #[error("the filter is empty; write an MQTT topic filter such as \"devices/{{device}}/#\"")]
    Empty,
    /// MQTT allows 65,535 bytes.
    #[error("the filter has {bytes} bytes; MQTT allows at most 65535")]
    TooLong {
        /// Length found.
        bytes: usize,
    },
    /// MQTT allows no U+0000.
    #[error("\"{filter}\" contains the character U+0000, which no topic can contain; remove it")]
    Nul {
        /// The filter, escaped.
        filter: String,
    },
    /// `#` anywhere but alone in the last level.
    #[error("\"{filter}\": '#' must be the whole last level, as in \"devices/{{device}}/#\"")]
    Rest {
        /// The filter.
        filter: String,
    },
    /// `+` beside other characters.
    #[error("\"{filter}\": '+' must be a whole level, as in \"devices/+/telemetry\"")]
    Any {
        /// The filter.
        filter: String,
    },
    /// More than one `{device}`.
    #[error("\"{filter}\" has more than one {{device}}; keep one, and write '+' for the others")]
    Devices {
        /// The filter.
        filter: String,
    },
    /// A brace that is not `{device}` as a whole level.
    #[error(
        "\"{filter}\": {{device}} is the only placeholder and must be a whole level, as in \
         \"devices/{{device}}/#\""
    )]
    Placeholder {
        /// The filter.
        filter: String,
    },
}

impl RouteFilter {
    /// Reads a filter.
    ///
    /// # Errors
    /// See [`RouteFilterError`].
    pub fn parse(text: &str) -> Result<Self, RouteFilterError> {
        if text.is_empty() {
            return Err(RouteFilterError::Empty);
        }
        if text.len() > usize::from(u16::MAX) {
            return Err(RouteFilterError::TooLong { bytes: text.len() });
        }
        if text.contains('\0') {
            return Err(RouteFilterError::Nul { filter: text.escape_default().to_string() });
        }
        let filter = || text.to_owned();
        let levels = text
            .split('/')
            .map(|level| match level {
                "+" => Ok(Level::Any),
                "#" => Ok(Level::Rest),
                "{device}" => Ok(Level::Device),
                _ if level.contains('#') => Err(RouteFilterError::Rest { filter: filter() }),
                _ if level.contains('+') => Err(RouteFilterError::Any { filter: filter() }),
                _ if level.contains(['{', '}']) => {
                    Err(RouteFilterError::Placeholder { filter: filter() })
                }
                _ => Ok(Level::Exactly(level.to_owned())),
            })
            .collect::<Result<Vec<_>, _>>()?;
        if levels[..levels.len() - 1].contains(&Level::Rest) {
            return Err(RouteFilterError::Rest { filter: filter() });
        }
        if levels.iter().filter(|level| **level == Level::Device).count() > 1 {
            return Err(RouteFilterError::Devices { filter: filter() });
        }
        Ok(Self(levels))
    }

    /// Whether one level is `{device}`.
    pub fn has_device(&self) -> bool {
        self.0.contains(&Level::Device)
    }

    /// `None` if the topic does not match; else the level that `{device}` stands for, or the client
    /// id if the filter has none.
    fn device_key(&self, topic: &ByteString, client_id: &ByteString) -> Option<ByteString> {
        // A wildcard in the first level does not match topics that begin with `$` [MQTT-4.7.2-1].
        if topic.starts_with('$') && !matches!(self.0.first(), Some(Level::Exactly(_))) {
            return None;
        }
        let mut device = None;
        let mut topic_levels = topic.split('/');
        for level in &self.0 {
            // `#` also matches its parent, where no level of the topic is left.
            if *level == Level::Rest {
                break;
            }
            let found = topic_levels.next()?;
            match level {
                Level::Exactly(expected) if found == expected => {}
                Level::Device if !found.is_empty() => device = Some(found),
                Level::Any => {}
                _ => return None,
            }
        }
        let matched = self.0.last() == Some(&Level::Rest) || topic_levels.next().is_none();
        matched.then(|| device.map_or_else(|| client_id.clone(), |level| topic.slice_ref(level)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn routes(filters: &[&str]) -> Routes {
        let configs: Vec<RouteConfig> = filters
            .iter()
            .map(|filter| RouteConfig {
                filter: (*filter).to_owned(),
                content_type: Some(format!("by/{filter}")),
                device: DeviceFrom::default(),
                event_id: None,
                event_type: Some(format!("type of {filter}")),
                lane: if filter.ends_with("alarm") { Lane::Alarm } else { Lane::Live },
                limits: RouteLimits::default(),
            })
            .collect();
        Routes::new(&configs).expect("valid filters")
    }

    fn key(filter: &str, topic: &str) -> Option<String> {
        let resolved = routes(&[filter])
            .resolve(&ByteString::from(topic), &ByteString::from_static("client"))?
            .device_key
            .to_string();
        Some(resolved)
    }

    #[test]
    fn without_routes_every_topic_is_accepted_under_the_client_id() {
        let routes = Routes::new(&[]).expect("no routes");
        let client = ByteString::from_static("client");
        for topic in ["a", "a/b", "/", "é/x"] {
            let resolved = routes.resolve(&ByteString::from(topic), &client).expect(topic);
            assert_eq!(resolved.device_key, client);
            assert_eq!(resolved.content_type, None);
        }
    }

    #[test]
    fn keys_and_matches() {
        for (filter, topic, expected) in [
            ("devices/{device}/#", "devices/d1/telemetry", Some("d1")),
            ("devices/{device}/#", "devices/d1/a/b/c", Some("d1")),
            ("devices/{device}/#", "devices/d1", Some("d1")),
            ("devices/{device}/#", "devices/d1/", Some("d1")),
            ("devices/{device}/#", "devices", None),
            ("devices/{device}/#", "devices//telemetry", None),
            ("devices/{device}/#", "Devices/d1/telemetry", None),
            ("devices/{device}", "devices/d1/telemetry", None),
            ("+/{device}/up", "site/é-7/up", Some("é-7")),
            ("+/{device}/up", "/d/up", Some("d")),
            ("{device}", "d1", Some("d1")),
            ("{device}", "$SYS", None),
            ("{device}/+", "a/", Some("a")),
            ("#", "any/thing", Some("client")),
            ("#", "$SYS/broker", None),
            ("+/broker", "$SYS/broker", None),
            ("$site/{device}/#", "$site/d1/x", Some("d1")),
            ("a/+", "a/b", Some("client")),
            ("a/+", "a", None),
            ("a/+", "a/b/c", None),
            ("a/#", "a", Some("client")),
            ("a/#", "ab", None),
            ("é/x", "é/x", Some("client")),
            ("/", "/", Some("client")),
        ] {
            assert_eq!(key(filter, topic).as_deref(), expected, "{filter} on {topic}");
        }
    }

    #[test]
    fn the_first_match_wins() {
        let routes = routes(&["plant/{device}/alarm", "plant/#", "#"]);
        let client = ByteString::from_static("client");
        for (topic, key, by) in [
            ("plant/p1/alarm", "p1", "by/plant/{device}/alarm"),
            ("plant/p1/state", "client", "by/plant/#"),
            ("other", "client", "by/#"),
        ] {
            let resolved = routes.resolve(&ByteString::from(topic), &client).expect(topic);
            assert_eq!(resolved.device_key, key, "{topic}");
            assert_eq!(resolved.content_type, Some(by), "{topic}");
            assert_eq!(resolved.event_type, Some(&*by.replace("by/", "type of ")), "{topic}");
            assert_eq!(resolved.lane == Lane::Alarm, topic.ends_with("alarm"), "{topic}");
        }
    }

    #[test]
    fn the_key_is_a_slice_of_the_topic() {
        let topic = ByteString::from("devices/dev-000123/telemetry");
        let routes = routes(&["devices/{device}/#"]);
        let resolved = routes.resolve(&topic, &ByteString::new()).expect("matches");
        let key = resolved.device_key.as_bytes();
        assert!(topic.as_bytes().as_ptr_range().contains(&key.as_ptr()));
    }

    #[test]
    fn wrong_filters_say_what_would_be_right() {
        for (filter, expected) in [
            ("", "the filter is empty; write an MQTT topic filter such as \"devices/{device}/#\""),
            ("a/#/b", "\"a/#/b\": '#' must be the whole last level, as in \"devices/{device}/#\""),
            ("a#", "\"a#\": '#' must be the whole last level, as in \"devices/{device}/#\""),
            ("a+/b", "\"a+/b\": '+' must be a whole level, as in \"devices/+/telemetry\""),
            (
                "{device}/{device}",
                "\"{device}/{device}\" has more than one {device}; keep one, and write '+' for \
                 the others",
            ),
            (
                "a/{key}",
                "\"a/{key}\": {device} is the only placeholder and must be a whole level, as in \
                 \"devices/{device}/#\"",
            ),
            (
                "a/x{device}",
                "\"a/x{device}\": {device} is the only placeholder and must be a whole level, as \
                 in \"devices/{device}/#\"",
            ),
            (
                "a\0",
                "\"a\\u{0}\" contains the character U+0000, which no topic can contain; remove it",
            ),
        ] {
            let error = RouteFilter::parse(filter).expect_err(filter);
            assert_eq!(error.to_string(), expected);
        }
        let long = "a".repeat(65_536);
        assert_eq!(
            RouteFilter::parse(&long).expect_err("too long").to_string(),
            "the filter has 65536 bytes; MQTT allows at most 65535"
        );
    }

    proptest! {
        /// Any text is either refused or read, and any topic can be held against what was read.
        #[test]
        fn no_input_harms(filter in "[a{}device+#/$é\0]{0,12}", topic in "[adé/$]{0,12}") {
            let client = ByteString::from_static("the client");
            if let Ok(filter) = RouteFilter::parse(&filter)
                && let Some(key) = filter.device_key(&topic.into(), &client)
            {
                let has_device = filter.0.contains(&Level::Device);
                prop_assert_eq!(key != client, has_device);
                prop_assert!(!key.is_empty() && !key.contains('/'));
            }
        }

        /// Rebuilding a topic from its filter gives the device back.
        #[test]
        fn the_device_comes_back(
            before in prop::collection::vec("[a-zé]{0,4}", 0..3),
            device in "[a-z0-9é-]{1,8}",
            after in prop::collection::vec("[a-z]{0,4}", 0..3),
        ) {
            let path = |middle: &str| {
                before.iter().map(String::as_str).chain([middle])
                    .chain(after.iter().map(String::as_str)).collect::<Vec<_>>().join("/")
            };
            let filter = RouteFilter::parse(&path("{device}")).expect("valid");
            let key = filter.device_key(&path(&device).into(), &ByteString::new());
            prop_assert_eq!(key.as_deref(), Some(device.as_str()));
        }
    }
}
