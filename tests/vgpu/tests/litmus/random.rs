//! Random programs of a few operations, to hold the virtual GPU against the axioms.

use std::fmt::Write;

/// splitmix64
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.below(of.len() as u64) as usize]
    }
}

/// A litmus test without claims: two or three threads of two or three operations on two words.
/// Scopes are mostly wide enough and accesses mostly strong, or nothing would ever synchronise.
pub(crate) fn program(number: u64) -> String {
    let mut r = Random(number);
    let threads = 2 + r.below(2) as usize;
    let mut columns: Vec<Vec<String>> = Vec::new();
    let mut written = 0u64;
    // All the same place for some, spread for others.
    let spread = r.below(3);
    let family = r.below(4);
    for thread in 0..threads {
        let device = if spread == 2 { r.below(2) } else { 0 };
        let block = if spread >= 1 { r.below(2) } else { 0 };
        let mut column = vec![format!("P{thread}@gpu {device},cta {block}")];
        // A family is dense in one way to synchronise: 1 has a fence in the middle of each thread
        // and mostly a different word on either side; 0 has writers and readers of messages.
        let operations = if family == 1 { 3 } else { 2 + r.below(2) };
        let mut next_register = 0;
        for operation in 0..operations {
            let scope = match r.below(if family < 2 { 12 } else { 6 }) {
                0 => "cta",
                1 | 2 => "gpu",
                _ => "sys",
            };
            let mut word = r.one(&["x", "y"]);
            written += 1;
            let mut kind = r.below(10);
            if family == 0 && r.below(5) > 0 {
                let reads = thread == 2 || (thread == 1 && (threads == 2 || operation == 0));
                kind = if reads { 0 } else { 4 };
                word = ["x", "y"][(operation as usize + usize::from(reads)) % 2];
            }
            if family == 1 {
                if r.below(4) > 0 {
                    word = ["x", "y"][(thread + operation as usize / 2) % 2];
                }
                kind = match operation {
                    0 => [4, 4, 4, 0, 7][r.below(5) as usize],
                    1 => 9,
                    _ => [0, 0, 0, 4, 7][r.below(5) as usize],
                };
            }
            column.push(match kind {
                0..=3 => {
                    let order = match family {
                        0 => r.one(&["acquire", "acquire", "relaxed"]),
                        1 | 2 => "relaxed",
                        _ => r.one(&["relaxed", "acquire", "weak"]),
                    };
                    let to = next_register;
                    next_register += 1;
                    match order {
                        "weak" => format!("ld.weak r{to}, {word}"),
                        order => format!("ld.{order}.{scope} r{to}, {word}"),
                    }
                }
                4..=6 => {
                    let order = match family {
                        0 => r.one(&["release", "release", "relaxed"]),
                        1 | 2 => "relaxed",
                        _ => r.one(&["relaxed", "release", "weak"]),
                    };
                    match order {
                        "weak" => format!("st.weak {word}, {written}"),
                        order => format!("st.{order}.{scope} {word}, {written}"),
                    }
                }
                7 => {
                    let order = r.one(&["relaxed", "acquire", "release", "acq_rel"]);
                    let update = r.one(&["add", "exch"]);
                    let to = next_register;
                    next_register += 1;
                    format!(
                        "atom.{order}.{scope}.{update} r{to}, {word}, {}",
                        16 * written
                    )
                }
                _ => {
                    let order = r.one(&["acq_rel", "sc", "sc", "sc", "acquire", "release"]);
                    format!("fence.{order}.{scope}")
                }
            });
        }
        columns.push(column);
    }
    let rows = columns.iter().map(Vec::len).max().unwrap_or(0);
    let mut text = format!("PTX random-{number}\n{{ x = 0; y = 0; }}\n");
    for row in 0..rows {
        let cells: Vec<&str> = columns
            .iter()
            .map(|c| c.get(row).map_or("", String::as_str))
            .collect();
        // Writing to a string does not fail.
        let _ = writeln!(text, "{} ;", cells.join(" | "));
    }
    text
}
