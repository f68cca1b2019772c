//! Which topics a client may publish and subscribe to: a pure decision.
//!
//! Owns: the rules of `[[acl]]` and what they come to for one client ([`Permissions`]).
//! The order of rules does not matter: what any rule grants is allowed, and once there is a rule,
//! nothing else is; what any rule keeps back is not, whoever grants it. A subscription is allowed if
//! every topic that its filter matches is granted and not every one of them is kept back: of a wider
//! one the topics that are kept back are not delivered.
//! Invariant: a placeholder stands for one level's text and never for more: a client id or a user
//! name with `/`, `+` or `#` in it is granted nothing by a rule that names it, and one that begins
//! with `$` nothing by a rule that begins with it: topics of that kind are the gateway's own.

use crate::config::AclConfig;
use crate::mqtt::topic;

/// Every rule.
#[derive(Clone, Debug, Default)]
pub struct Acl {
    rules: Vec<AclConfig>,
}

/// What the rules come to for one client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permissions {
    /// Filters, the client's names in their places; `None`: there are no rules.
    publish: Option<Vec<String>>,
    subscribe: Option<Vec<String>>,
    kept_back: Vec<String>,
}

impl Acl {
    /// No rules at all allow everything.
    pub fn new(rules: Vec<AclConfig>) -> Self {
        Self { rules }
    }

    /// What a client may do. `user` is `None` for an anonymous client, `client_id` is what it said
    /// itself, and empty if it said nothing.
    pub fn permissions(&self, client_id: &str, user: Option<&str>) -> Permissions {
        if self.rules.is_empty() {
            return Permissions { publish: None, subscribe: None, kept_back: Vec::new() };
        }
        let meant = |rule: &&AclConfig| {
            rule.users.is_empty() || user.is_some_and(|user| rule.users.iter().any(|u| u == user))
        };
        let filters = |patterns: fn(&AclConfig) -> &[String]| {
            let rules = self.rules.iter().filter(meant);
            let patterns = rules.flat_map(patterns);
            patterns.filter_map(|pattern| expand(pattern, client_id, user)).collect()
        };
        Permissions {
            publish: Some(filters(|rule| &rule.publish)),
            subscribe: Some(filters(|rule| &rule.subscribe)),
            kept_back: filters(|rule| &rule.deny_subscribe),
        }
    }
}

impl Permissions {
    /// Whether the client may publish to a topic.
    pub fn may_publish(&self, topic: &str) -> bool {
        allows(self.publish.as_deref(), topic)
    }

    /// Whether the client may subscribe to a filter; of a shared one, what follows its group.
    pub fn may_subscribe(&self, filter: &str) -> bool {
        let shared = filter.strip_prefix("$share/").and_then(|rest| rest.split_once('/'));
        let filter = shared.map_or(filter, |(_, filter)| filter);
        allows(self.subscribe.as_deref(), filter) && !self.keeps_back(filter)
    }

    /// Whether a topic is kept back from the client, whatever wider filter it subscribes to.
    pub fn keeps_back(&self, topic: &str) -> bool {
        self.kept_back.iter().any(|filter| covers(filter, topic))
    }
}

fn allows(granted: Option<&[String]>, wanted: &str) -> bool {
    granted.is_none_or(|filters| filters.iter().any(|filter| covers(filter, wanted)))
}

/// Puts a client's names in their places; `None` if one of them does not fit there.
fn expand(pattern: &str, client_id: &str, user: Option<&str>) -> Option<String> {
    let mut expanded = pattern.to_owned();
    for (placeholder, name) in [("%c", Some(client_id)), ("%u", user)] {
        if pattern.contains(placeholder) {
            let begins = pattern.starts_with(placeholder);
            let fits = |name: &&str| {
                let is_level = !name.is_empty() && !name.contains(['/', '+', '#', '%', '\0']);
                is_level && (!begins || !name.starts_with('$'))
            };
            expanded = expanded.replace(placeholder, name.filter(fits)?);
        }
    }
    Some(expanded)
}

/// Whether every topic that `wanted` matches, a topic or a filter, is matched by `granted`.
fn covers(granted: &str, wanted: &str) -> bool {
    // [MQTT-4.7.2-1]
    if wanted.starts_with('$') && granted.starts_with(['+', '#']) {
        return false;
    }
    let mut wanted = wanted.split('/');
    for level in granted.split('/') {
        if level == "#" {
            return true;
        }
        match wanted.next() {
            Some("#") | None => return false,
            Some(found) => {
                if level != "+" && level != found {
                    return false;
                }
            }
        }
    }
    wanted.next().is_none()
}

/// Why a pattern of `[[acl]]` is none; `None` if it is one.
pub(crate) fn wrong_pattern(pattern: &str) -> Option<String> {
    (!topic::is_valid_filter(pattern)).then(|| {
        format!("must be topic filters such as \"devices/%c/#\", with '+' and '#' as whole levels; not {pattern:?}")
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rule(users: &[&str], publish: &[&str], subscribe: &[&str]) -> AclConfig {
        let owned = |texts: &[&str]| texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>();
        AclConfig {
            users: owned(users),
            publish: owned(publish),
            subscribe: owned(subscribe),
            deny_subscribe: Vec::new(),
        }
    }

    #[test]
    fn without_rules_everything_is_allowed_and_with_one_nothing_else() {
        let all = Acl::default().permissions("c", None);
        assert!(all.may_publish("any/thing") && all.may_subscribe("#"));
        let none = Acl::new(vec![rule(&["root"], &["#"], &["#"])]).permissions("c", Some("u"));
        assert!(!none.may_publish("any/thing") && !none.may_subscribe("#"));
        let anonymous = Acl::new(vec![rule(&["root"], &["#"], &[])]).permissions("root", None);
        assert!(!anonymous.may_publish("t"), "a client id is no user");
    }

    #[test]
    fn rules_add_up_and_publish_is_not_subscribe() {
        let acl = Acl::new(vec![
            rule(&[], &["devices/%c/#"], &["commands/%c/+"]),
            rule(&["alice", "bob"], &["plant/%u/state"], &["plant/#"]),
        ]);
        let alice = acl.permissions("d1", Some("alice"));
        for topic in ["devices/d1", "devices/d1/a/b", "plant/alice/state"] {
            assert!(alice.may_publish(topic), "{topic}");
        }
        for topic in ["devices/d2", "plant/bob/state", "commands/d1/reboot", "plant/alice/state/x"]
        {
            assert!(!alice.may_publish(topic), "{topic}");
        }
        for filter in ["commands/d1/+", "commands/d1/x", "plant/#", "plant/+/x", "$share/g/plant/#"]
        {
            assert!(alice.may_subscribe(filter), "{filter}");
        }
        for filter in ["commands/d1/#", "commands/+/x", "#", "devices/d1/#", "$share/g/#", "+/x"] {
            assert!(!alice.may_subscribe(filter), "{filter}");
        }
        let eve = acl.permissions("d1", Some("eve"));
        assert!(eve.may_publish("devices/d1/t") && !eve.may_subscribe("plant/#"));
    }

    #[test]
    fn a_name_does_not_widen_a_pattern() {
        let acl = Acl::new(vec![rule(&[], &["a/%c/b", "u/%u"], &["a/%c/#"])]);
        for name in ["#", "+", "x/y", "", "a#", "%u", "x\0"] {
            let permissions = acl.permissions(name, Some(name));
            assert_eq!(permissions.publish, Some(vec![]), "{name:?}");
            assert_eq!(permissions.subscribe, Some(vec![]), "{name:?}");
        }
        let first = Acl::new(vec![rule(&[], &["%c/#", "x/%c"], &["%u/#"])]);
        let first = first.permissions("$SYS", Some("$SYS"));
        assert!(!first.may_publish("$SYS/a") && !first.may_subscribe("$SYS/#"));
        assert!(first.may_publish("x/$SYS"));
        let prefixed = Acl::new(vec![rule(&[], &["dev-%c/%u"], &[])]).permissions("7", Some("u"));
        assert!(prefixed.may_publish("dev-7/u"));
    }

    #[test]
    fn wildcards_do_not_reach_the_servers_own_topics_mqtt_4_7_2_1() {
        assert!(!covers("#", "$SYS/#") && !covers("+/a", "$SYS/a"));
        assert!(covers("$SYS/#", "$SYS/a") && covers("#", "a/$SYS"));
    }

    /// MQTT's own matching of a topic, in other words than those above.
    fn matches(filter: &str, topic: &str) -> bool {
        let (level, filter) = filter.split_once('/').map_or((filter, None), |(a, b)| (a, Some(b)));
        let (found, topic) = topic.split_once('/').map_or((topic, None), |(a, b)| (a, Some(b)));
        match (filter, topic) {
            _ if level == "#" => true,
            _ if level != "+" && level != found => false,
            (None, None) => true,
            (Some(filter), None) => filter == "#",
            (None, Some(_)) => false,
            (Some(filter), Some(topic)) => matches(filter, topic),
        }
    }

    proptest! {
        /// What a granted filter covers matches nothing that the grant does not.
        #[test]
        fn nothing_slips_through_a_subscription(
            granted in "([ab+]/){0,3}[ab+#]",
            wanted in "([ab+]/){0,3}[ab+#]",
            topic in "([abc]/){0,4}[abc]",
        ) {
            if covers(&granted, &wanted) && matches(&wanted, &topic) {
                prop_assert!(matches(&granted, &topic), "{granted} grants {wanted}: {topic}");
            }
            prop_assert_eq!(covers(&granted, &topic), matches(&granted, &topic));
        }
    }

    #[test]
    fn what_is_kept_back_is_in_no_subscription() {
        let rules = vec![
            rule(&[], &["#"], &["#"]),
            AclConfig {
                deny_subscribe: vec!["secrets/#".into(), "%c/own".into()],
                ..rule(&[], &[], &[])
            },
        ];
        let permissions = Acl::new(rules).permissions("dev", None);
        for filter in ["secrets", "secrets/#", "secrets/+", "$share/g/secrets/x", "dev/own"] {
            assert!(!permissions.may_subscribe(filter), "{filter}");
        }
        for filter in ["#", "+/+", "$share/g/#", "dev/other", "other/own"] {
            assert!(permissions.may_subscribe(filter), "{filter}");
        }
        assert!(permissions.keeps_back("secrets/x") && permissions.keeps_back("dev/own"));
        assert!(!permissions.keeps_back("dev/other") && permissions.may_publish("secrets/x"));
    }
}
