//! Random lives of a store against the model: every step may be followed by a check of all that
//! the store shows.

use proptest::collection::vec;
use proptest::prelude::*;

use super::world::{self, SINKS, World};
use super::*;
use crate::sim::{Faults, SimDisk};

#[derive(Clone, Debug)]
enum Step {
    Commit {
        count: usize,
        payload_bytes: usize,
        key: Option<u8>,
    },
    /// Moves the cursor of a sink to a part of the watermark, in 1/255.
    Cursor {
        sink: usize,
        part: u8,
    },
    Put {
        key: u8,
        bytes: usize,
    },
    Delete {
        key: u8,
    },
    Retain {
        later_us: u64,
    },
    Check,
    Kill,
    CutPower,
    Close,
    /// Opens again with one sink only, or with both.
    Sinks {
        both: bool,
    },
    FailSync {
        after: u64,
    },
    FillDisk {
        pages: usize,
    },
    EmptyDisk,
    /// Lets the journal flush, or sync a log file.
    Journal {
        checkpoint: bool,
    },
    /// Packs a file, if any is due after a checkpoint.
    Pack,
    /// Flips a bit of a sealed file.
    Damage {
        file: u16,
        page: u16,
        within: u16,
        bit: u8,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (1..60_usize, 0..3000_usize, prop::option::of(0..8_u8))
            .prop_map(|(count, payload_bytes, key)| Step::Commit { count, payload_bytes, key }),
        4 => (0..2_usize, any::<u8>()).prop_map(|(sink, part)| Step::Cursor { sink, part }),
        1 => (0..8_u8, 0..6000_usize).prop_map(|(key, bytes)| Step::Put { key, bytes }),
        1 => (0..8_u8).prop_map(|key| Step::Delete { key }),
        2 => (0..90_000_000_u64).prop_map(|later_us| Step::Retain { later_us }),
        1 => Just(Step::Check),
        1 => Just(Step::Kill),
        1 => Just(Step::CutPower),
        1 => Just(Step::Close),
        1 => any::<bool>().prop_map(|both| Step::Sinks { both }),
        1 => (0..6_u64).prop_map(|after| Step::FailSync { after }),
        1 => (0..60_usize).prop_map(|pages| Step::FillDisk { pages }),
        2 => Just(Step::EmptyDisk),
        2 => Just(Step::Pack),
        1 => (any::<u16>(), any::<u16>(), 0..4096_u16, 0..8_u8)
            .prop_map(|(file, page, within, bit)| Step::Damage { file, page, within, bit }),
        4 => prop::bool::weighted(0.2).prop_map(|checkpoint| Step::Journal { checkpoint }),
    ]
}

fn take(world: &mut World, step: &Step) {
    match *step {
        Step::Commit { count, payload_bytes, key } => {
            let events = world.make(count, payload_bytes);
            let control = key.map(|key| put(key, payload_bytes)).into_iter().collect();
            // Which errors may come depends on the faults; what they mean, `commit` checks.
            let _ = world.commit(events, control);
            world.now_us += 1_000_000;
        }
        Step::Cursor { sink, part } => {
            let offset = world.watermark() * u64::from(part) / 255;
            let _ = world.cursor_to(SINKS[sink], offset);
        }
        Step::Put { key, bytes } => {
            let _ = world.commit(vec![], vec![put(key, bytes)]);
        }
        Step::Delete { key } => {
            let delete = Control::Delete { namespace: 1, key: Bytes::from(vec![key]) };
            let _ = world.commit(vec![], vec![delete]);
        }
        Step::Retain { later_us } => {
            world.now_us += later_us;
            let _ = world.retain();
        }
        Step::Check => world.check(),
        Step::Kill => world.reopen(world.disk.after_kill()),
        Step::CutPower => world.reopen(world.disk.after_cut()),
        Step::Close => world.reopen_cleanly(),
        Step::Sinks { both } => {
            let sinks = &SINKS[..if both { 2 } else { 1 }];
            world.options.sinks = sinks.iter().copied().map(SinkRetention::new).collect();
            world.reopen(world.disk.after_kill());
        }
        Step::FailSync { after } => {
            world.disk.set_faults(|faults| faults.fail_sync_after = Some(after));
        }
        Step::FillDisk { pages } => {
            let used = world.disk.pages();
            world.disk.set_faults(|faults| faults.pages_max = Some(used + pages));
        }
        Step::Journal { checkpoint } => world.step(checkpoint),
        Step::Pack => {
            // Whichever fails, nothing is lost by it.
            let _ = world.writer.checkpoint(&[]);
            let _ = world.store.packer().step(&|| true);
        }
        Step::Damage { file, page, within, bit } => world.damage(file, page, within, bit),
        Step::EmptyDisk => world.disk.set_faults(|faults| *faults = Faults::default()),
    }
}

fn put(key: u8, bytes: usize) -> Control {
    let value = vec![bytes as u8; bytes].into();
    Control::Put { namespace: 1, key: Bytes::from(vec![key]), value }
}

fn policy() -> impl Strategy<Value = StoreOptions> {
    let quota = prop_oneof![Just(1_u64 << 30), Just(900 << 10)];
    let at_quota = prop_oneof![Just(AtQuota::Hold), Just(AtQuota::DropOldest)];
    let retain = prop_oneof![Just((0, 0)), Just((200 << 10, 0)), Just((0, 60_000_000))];
    let journal = prop_oneof![Just(JournalMode::Off), Just(JournalMode::On)];
    let compression =
        prop_oneof![Just(Compression::None), Just(Compression::Lz4), Just(Compression::Zstd)];
    let policy = (quota, at_quota, retain, journal, any::<bool>(), compression);
    policy.prop_map(|(quota_bytes, at_quota, retain, journal, sinks, compression)| {
        let (retain_bytes, retain_age_us) = retain;
        let mut options = StoreOptions {
            quota_bytes,
            at_quota,
            retain_bytes,
            retain_age_us,
            journal,
            compression,
            ..world::options()
        };
        if !sinks {
            options.sinks.clear();
        }
        options
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_random_life_is_what_the_model_says(
        options in policy(),
        seed in any::<u64>(),
        steps in vec(step(), 1..60),
    ) {
        let mut world = World::new(SimDisk::new(seed), options);
        for step in steps {
            take(&mut world, &step);
        }
        world.disk.set_faults(|faults| *faults = Faults::default());
        world.check();
        world.reopen(world.disk.after_cut());
        world.reopen_cleanly();
    }
}
