//! A report for people.

use std::fmt::{self, Display, Formatter};

use super::{Copied, Counts, Global, Link, Report, Shared};

fn place(device: Option<u32>) -> String {
    device.map_or("host".to_owned(), |d| format!("device {d}"))
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for l in &self.launches {
            let ([gx, gy, gz], [bx, by, bz]) = (l.grid, l.block);
            writeln!(
                f,
                "launch {}: {} on device {}, grid ({gx},{gy},{gz}), block ({bx},{by},{bz})",
                l.id, l.kernel, l.device
            )?;
            write!(f, "{}", l.counts)?;
        }
        writeln!(f, "total of {} launches", self.launches.len())?;
        write!(f, "{}", self.total)?;
        writeln!(f, "instructions, by how many threads executed them")?;
        let mut instructions: Vec<_> = self.total.instructions.iter().collect();
        instructions.sort_by_key(|(name, n)| (u64::MAX - n.lanes, *name));
        for (name, n) in instructions {
            writeln!(f, "  {:>14} {name} ({} by warps)", n.lanes, n.warps)?;
        }
        for Copied {
            from,
            to,
            count,
            bytes,
        } in &self.copies
        {
            let (from, to) = (place(*from), place(*to));
            writeln!(f, "copies from {from} to {to}: {count}, {bytes} bytes")?;
        }
        for t in &self.memory {
            writeln!(
                f,
                "{} bytes at {:#x} of {}: {} bytes read ({} of them once or more), {} written ({})",
                t.bytes,
                t.address,
                place(t.device),
                t.read,
                t.read_distinct,
                t.written,
                t.written_distinct
            )?;
        }
        Ok(())
    }
}

impl Display for Counts {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "  {:>14} instructions of threads",
            self.lane_instructions
        )?;
        for (name, g) in [
            ("global loads", &self.global_loads),
            ("global stores", &self.global_stores),
            ("global atomics", &self.global_atomics),
        ] {
            global(f, name, g)?;
        }
        for (name, s) in [
            ("shared loads", &self.shared_loads),
            ("shared stores", &self.shared_stores),
        ] {
            shared(f, name, s)?;
        }
        let atomics = &self.shared_atomics;
        if atomics.requests > 0 {
            let (bytes, threads) = (atomics.bytes, atomics.threads);
            writeln!(f, "  {bytes:>14} bytes in {threads} shared atomics")?;
        }
        if self.barriers > 0 {
            writeln!(f, "  {:>14} barriers of blocks", self.barriers)?;
        }
        for (name, n) in &self.strong {
            writeln!(f, "  {n:>14} {name} by threads")?;
        }
        if self.spins > 0 {
            writeln!(f, "  {:>14} spins", self.spins)?;
        }
        for Link {
            from,
            to,
            read,
            written,
            atomics,
            spun,
        } in &self.links
        {
            let to = place(*to);
            writeln!(
                f,
                "  device {from} > {to}: {read} bytes read, {written} written, {atomics} by \
                 atomics, {spun} spun"
            )?;
        }
        Ok(())
    }
}

fn global(f: &mut Formatter<'_>, name: &str, g: &Global) -> fmt::Result {
    if g.requests == 0 {
        return Ok(());
    }
    let share = 100.0 * g.bytes as f64 / (32 * g.sectors) as f64;
    writeln!(
        f,
        "  {:>14} bytes in {} {name} of warps, {} sectors ({share:.0} % asked for)",
        g.bytes, g.requests, g.sectors
    )
}

fn shared(f: &mut Formatter<'_>, name: &str, s: &Shared) -> fmt::Result {
    if s.requests == 0 {
        return Ok(());
    }
    writeln!(
        f,
        "  {:>14} bytes in {} {name} of warps, {} passes, {} of them for conflicts",
        s.bytes, s.requests, s.wavefronts, s.conflicts
    )
}
