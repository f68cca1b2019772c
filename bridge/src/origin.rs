//! Who this gateway is, as every event upstream says.

/// The first half of an event's identity; partition and sequence number are the other.
#[derive(Clone, Debug)]
pub struct Origin {
    /// Configured id of the gateway.
    pub gateway: String,
    /// Epoch of the store.
    pub epoch: u64,
}
