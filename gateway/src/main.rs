//! `edge-gateway`: everything is in the library, see its code map.

use std::process::ExitCode;

fn main() -> ExitCode {
    gateway::cli::main()
}
