//! Control records: changes of state that ride in a batch beside the events.
//!
//! Owns: [`Control`], the one way in which state that must be atomic with events, or synced with
//! them, changes. State is a projection of the log: `namespace, key -> value`, opaque to this
//! crate except for the namespace of the cursors, which retention reads.

use bytes::Bytes;
use bytestring::ByteString;

/// A change of the key-value projection, durable with the batch that carries it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// The sink needs nothing below `offset` any more. A cursor only moves forward: a lower
    /// offset than the stored one is ignored.
    Cursor {
        /// Name of the sink.
        sink: ByteString,
        /// Next offset that the sink needs.
        offset: u64,
    },
    /// Sets a key of a namespace (sessions, QoS 2 receipts, retained messages ...).
    Put {
        /// Namespace, chosen by its owner.
        namespace: u16,
        /// Key within the namespace.
        key: Bytes,
        /// New value.
        value: Bytes,
    },
    /// Removes a key of a namespace; one that is not there is no error.
    Delete {
        /// Namespace, chosen by its owner.
        namespace: u16,
        /// Key within the namespace.
        key: Bytes,
    },
}
