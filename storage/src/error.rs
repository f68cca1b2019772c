//! Errors, one variant per thing that a caller does differently.

use std::path::PathBuf;

/// Why a store could not be opened. Each text is one line that says what and what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process holds the lock.
    #[error(
        "the store in {path} is in use by another process; stop it, or choose another data_dir"
    )]
    InUse {
        /// Data folder.
        path: PathBuf,
    },
    /// Nothing was ever stored there; only who wants to look at a store minds.
    #[error("there is no store in {path}; check gateway.data_dir, or run the gateway once")]
    Missing {
        /// Data folder.
        path: PathBuf,
    },
    /// Written by a later version.
    #[error(
        "the store in {path} has format {found}, and this version reads up to {supported}; \
         install the version that wrote it, or choose another data_dir"
    )]
    NewerFormat {
        /// Data folder.
        path: PathBuf,
        /// Format number found.
        found: u32,
        /// Highest format number this version reads.
        supported: u32,
    },
    /// Opened with another number of partitions than it was created with.
    #[error(
        "the store in {path} has {stored} partitions and the configuration asks for {configured}; \
         set ingest.partitions = {stored}, or choose an empty data_dir"
    )]
    Partitions {
        /// Data folder.
        path: PathBuf,
        /// What the store has.
        stored: u16,
        /// What was asked for.
        configured: u16,
    },
    /// The folder cannot be created, read or written.
    #[error("cannot use the data folder {path}: {source}; check that it exists and is writable")]
    Folder {
        /// Data folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The state database does not say what it said when it was written.
    #[error(
        "{path} is damaged: {reason}; copy the data folder, then let `edge-gateway store repair` make \
         it anew from the log files"
    )]
    DamagedState {
        /// The file.
        path: PathBuf,
        /// What redb or the head row's check said.
        reason: String,
    },
    /// A database file cannot be opened.
    #[error("cannot open {path}: {reason}")]
    Database {
        /// The file.
        path: PathBuf,
        /// What redb or the head row's check said.
        reason: String,
    },
}

/// Why a commit was not made durable. Nothing of it may be acked.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// The quota is reached and the policy is to hold or to refuse; the events stay the caller's.
    #[error(
        "the store holds {used_bytes} bytes, its quota is {quota_bytes}; bring the sinks that lag back, \
         or raise storage.quota_bytes"
    )]
    Quota {
        /// Bytes in use.
        used_bytes: u64,
        /// Configured quota.
        quota_bytes: u64,
    },
    /// The file system has no room.
    #[error("no space left on the device that holds {path}; make room, it goes on by itself")]
    DiskFull {
        /// File that could not grow.
        path: PathBuf,
    },
    /// The file system has less room than is to be left free; nothing was written.
    #[error(
        "only {free_bytes} bytes are free on the device that holds {path}, and \
         storage.free_bytes_min is {free_bytes_min}; make room, it goes on by itself"
    )]
    LittleSpace {
        /// Folder of the log.
        path: PathBuf,
        /// Bytes that are free.
        free_bytes: u64,
        /// Bytes that are to be left free.
        free_bytes_min: u64,
    },
    /// The write or the sync failed; the writer goes on in a new file.
    #[error("writing {path} failed: {reason}")]
    Io {
        /// File.
        path: PathBuf,
        /// What redb said.
        reason: String,
    },
}

/// Why a read failed.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A file of the log cannot be read.
    #[error("reading {path} failed: {reason}")]
    Io {
        /// File.
        path: PathBuf,
        /// What redb said.
        reason: String,
    },
}

/// Why the state database could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("the state database failed: {reason}")]
pub struct StateError {
    /// The file system has no room.
    pub disk_full: bool,
    /// What redb said.
    pub reason: String,
}
