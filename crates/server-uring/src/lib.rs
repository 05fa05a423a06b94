//! The host daemon of ringfs.
pub mod creds;
pub mod fdops;
pub mod import;
