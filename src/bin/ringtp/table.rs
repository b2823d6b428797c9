//! Tables of plain text.

use std::fmt::Write;

/// Which side of its column a cell stands at.
#[derive(Clone, Copy)]
pub(crate) enum Side {
    Left,
    Right,
}

/// The rows under each other, each column as wide as its widest cell, two spaces between them.
pub(crate) fn table<const N: usize>(sides: [Side; N], rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for ((cell, width), side) in row.iter().zip(widths).zip(sides) {
            // Writing to a string does not fail.
            let _ = match side {
                Side::Left => write!(line, "{cell:width$}  "),
                Side::Right => write!(line, "{cell:>width$}  "),
            };
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}
