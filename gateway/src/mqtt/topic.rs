//! Topic names and filters: what is valid, and what matches what.
//!
//! Works on bytes and on whole levels between slashes, so that any UTF-8 is safe.

/// Whether `topic` may be published to: at least one character [MQTT-4.7.3-1], no wildcards
/// [MQTT-3.3.2-2], no U+0000 [MQTT-4.7.3-2].
pub fn is_valid_name(topic: &str) -> bool {
    !topic.is_empty() && !topic.bytes().any(|b| matches!(b, b'+' | b'#' | 0))
}

/// Whether `filter` may be subscribed to: at least one character, no U+0000, `#` alone in the last
/// level [MQTT-4.7.1-1], `+` alone in its level [MQTT-4.7.1-2].
pub fn is_valid_filter(filter: &str) -> bool {
    if filter.is_empty() || filter.as_bytes().contains(&0) {
        return false;
    }
    let mut levels = filter.split('/').peekable();
    while let Some(level) = levels.next() {
        let valid = match level {
            "+" => true,
            "#" => levels.peek().is_none(),
            _ => !level.contains(['+', '#']),
        };
        if !valid {
            return false;
        }
    }
    true
}

/// Group and filter of a shared subscription: a name of at least one character without wildcards
/// [MQTT-4.8.2-1], and a filter behind it [MQTT-4.8.2-2].
pub fn shared(filter: &str) -> Option<(&str, &str)> {
    let (group, filter) = filter.strip_prefix("$share/")?.split_once('/')?;
    let valid = !group.is_empty() && !group.contains(['+', '#']) && is_valid_filter(filter);
    valid.then_some((group, filter))
}

/// Whether a valid filter matches a valid topic.
pub fn matches(filter: &str, topic: &str) -> bool {
    // [MQTT-4.7.2-1]
    if topic.starts_with('$') && filter.starts_with(['#', '+']) {
        return false;
    }
    let (mut filter, mut topic) = (filter.split('/'), topic.split('/'));
    loop {
        match (filter.next(), topic.next()) {
            (Some("#"), _) | (None, None) => return true,
            (Some("+"), Some(_)) => {}
            (Some(level), Some(other)) if level == other => {}
            _ => return false,
        }
    }
}

/// Whether a filter names a shared subscription (MQTT 5, 4.8.2).
pub fn is_shared(filter: &str) -> bool {
    filter == "$share" || filter.starts_with("$share/")
}

/// Whether the topic belongs to the server, so that no client may publish to it.
pub fn is_reserved(topic: &str) -> bool {
    topic
        .strip_prefix("$SYS")
        .or_else(|| topic.strip_prefix("$share"))
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["a", "/", "a/b", "é/x", "$dev/x", " ", "a//b"] {
            assert!(is_valid_name(good), "{good}");
        }
        for bad in ["", "a/+", "#", "a\0b", "a#"] {
            assert!(!is_valid_name(bad), "{bad:?}");
        }
    }

    #[test]
    fn filters() {
        for good in ["a", "#", "+", "a/#", "+/+/#", "/", "é/+", "$SYS/#", "/+"] {
            assert!(is_valid_filter(good), "{good}");
        }
        for bad in ["", "a#", "#/a", "a/#/b", "a+", "+a/b", "a\0"] {
            assert!(!is_valid_filter(bad), "{bad:?}");
        }
    }

    #[test]
    fn shared_subscriptions_mqtt_4_8_2_1_and_2() {
        assert_eq!(shared("$share/g/a/#"), Some(("g", "a/#")));
        assert_eq!(shared("$share/g//"), Some(("g", "/")));
        for bad in ["$share", "$share/", "$share/g", "$share/g/", "$share//a", "$share/+/a", "a/b"]
        {
            assert_eq!(shared(bad), None, "{bad}");
        }
    }

    #[test]
    fn matching() {
        for (filter, topic) in
            [("a/#", "a"), ("a/#", "a/b/c"), ("+/b", "a/b"), ("/+", "/a"), ("#", "/")]
        {
            assert!(matches(filter, topic), "{filter} {topic}");
        }
        for (filter, topic) in
            [("a/+", "a"), ("a", "a/b"), ("#", "$SYS/x"), ("+/x", "$SYS/x"), ("a/b/#", "a")]
        {
            assert!(!matches(filter, topic), "{filter} {topic}");
        }
    }

    #[test]
    fn reserved_topics() {
        assert!(is_reserved("$SYS") && is_reserved("$SYS/x") && is_reserved("$share/g/t"));
        assert!(!is_reserved("$SYSTEM") && !is_reserved("$aws/x") && !is_reserved("SYS"));
    }
}
