//! The counts: `VGPU_REPORT`, and the calls that tests take them with.

use std::io::Write;

use super::status::{Out, Status};
use super::{Driver, api, explain};

/// What `VGPU_REPORT` asks for.
pub(super) enum Wanted {
    /// The table, on standard error.
    Shown,
    /// The table in a file, or JSON where the name ends so.
    File(String),
}

pub(super) fn wanted() -> Option<Wanted> {
    match std::env::var("VGPU_REPORT").ok()?.as_str() {
        "" => None,
        "-" => Some(Wanted::Shown),
        // Programs that start others have a report of each.
        path => Some(Wanted::File(
            path.replace("%p", &std::process::id().to_string()),
        )),
    }
}

impl Driver {
    /// Writes what was counted and nobody took, where `VGPU_REPORT` says.
    pub(super) fn write_report(&mut self) {
        let (Some(wanted), Some(counter)) = (wanted(), &self.machine.world.report) else {
            return;
        };
        let report = counter.report();
        let path = match wanted {
            Wanted::Shown => {
                // If standard error is closed, there is nobody to tell.
                let _ = write!(std::io::stderr(), "{report}");
                return;
            }
            Wanted::File(path) => path,
        };
        let text = if path.ends_with(".json") {
            serde_json::to_string(&report).unwrap_or_else(|e| e.to_string()) + "\n"
        } else {
            report.to_string()
        };
        if let Err(error) = std::fs::write(&path, text) {
            eprintln!("vgpu: VGPU_REPORT: {path}: {error}");
        }
    }
}

fn off(name: &str) -> Status {
    explain(
        name,
        "nothing is counted; set VGPU_REPORT, or call vgpuSetReport(1) first",
    );
    Status::ILLEGAL_STATE
}

api! {
    // Begins to count, from nothing, or ends it.
    fn vgpuSetReport(on: u32) |driver| {
        driver.machine.world.report = (on != 0).then(Box::default);
        Ok(())
    }

    // What was counted, as JSON that ends in a zero; counting then begins from nothing. With too
    // little room nothing is taken: the caller learns how much it needs.
    fn vgpuTakeReport(text: Out<u8>, capacity: u64, length: Out<u64>) |driver| {
        let counter = driver.machine.world.report.as_ref();
        let report = counter.ok_or_else(|| off("vgpuTakeReport"))?.report();
        let mut words = serde_json::to_string(&report).map_err(|_| Status::UNKNOWN)?;
        words.push('\0');
        length.set(words.len() as u64)?;
        if words.len() as u64 <= capacity {
            text.write(words.as_bytes());
            driver.machine.world.report = Some(Box::default());
        }
        Ok(())
    }

    // What kernels did to a part of an allocation, which begins and ends at multiples of 4: bytes
    // read, those read at least once, bytes written, those written at least once. Takes nothing.
    fn vgpuCountBytes(address: u64, bytes: u64, counts: Out<[u64; 4]>) |driver| {
        let counter = driver.machine.world.report.as_ref();
        let counter = counter.ok_or_else(|| off("vgpuCountBytes"))?;
        let Some(part) = counter.part(&driver.machine.world.memory, address, bytes) else {
            explain("vgpuCountBytes", format_args!(
                "{bytes} bytes at {address:#x} are no part of an allocation in whole words"
            ));
            return Err(Status::INVALID_VALUE);
        };
        counts.set([part.read, part.read_distinct, part.written, part.written_distinct])
    }
}
