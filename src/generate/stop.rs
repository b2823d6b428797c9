//! Stop strings in streamed text.

/// Looks for stop strings in text that comes in pieces, and lets through only what cannot
/// become part of one.
///
/// The result does not depend on where the pieces are cut: the stop string that is complete
/// first ends the text, of several the longest.
#[derive(Clone, Debug)]
pub struct StopFilter {
    stop: Vec<String>,
    /// Text that begins a stop string, perhaps.
    held: String,
    stopped: bool,
}

impl StopFilter {
    /// A filter for `stop`, none of them empty.
    pub fn new(stop: &[String]) -> Self {
        Self {
            stop: stop.to_vec(),
            held: String::new(),
            stopped: false,
        }
    }

    /// Whether a stop string was found. Text after it is ignored.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Takes `piece` and appends to `out` what is settled.
    pub fn push(&mut self, piece: &str, out: &mut String) {
        if self.stopped {
            return;
        }
        self.held.push_str(piece);
        let found = self.stop.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start))
        });
        if let Some((_, start)) = found.min() {
            out.push_str(&self.held[..start]);
            self.held.clear();
            self.stopped = true;
            return;
        }
        let settled = self.held.len() - self.undecided();
        out.push_str(&self.held[..settled]);
        self.held.drain(..settled);
    }

    /// No more text will come: appends to `out` what was held back.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// The bytes of the longest end of the held text that begins a stop string.
    fn undecided(&self) -> usize {
        let longest = self.stop.iter().map(String::len).max().unwrap_or(0);
        let first = self.held.len().saturating_sub(longest);
        (first..self.held.len())
            .filter(|&start| self.held.is_char_boundary(start))
            .find(|&start| {
                let end = &self.held[start..];
                self.stop.iter().any(|stop| stop.starts_with(end))
            })
            .map_or(0, |start| self.held.len() - start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, character by character: cut where the first stop string is complete.
    fn oracle(text: &str, stop: &[String]) -> (String, bool) {
        let ends = text.char_indices().map(|(i, c)| i + c.len_utf8());
        for end in ends {
            let hit = stop.iter().filter(|stop| text[..end].ends_with(*stop));
            if let Some(longest) = hit.map(String::len).max() {
                return (text[..end - longest].to_string(), true);
            }
        }
        (text.to_string(), false)
    }

    fn filter(pieces: &[String], stop: &[String]) -> (String, bool) {
        let mut filter = StopFilter::new(stop);
        let mut out = String::new();
        for piece in pieces {
            filter.push(piece, &mut out);
        }
        filter.finish(&mut out);
        (out, filter.stopped())
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition_however_the_text_is_cut(
            pieces in prop::collection::vec("[abé]{0,4}", 0..12),
            stop in prop::collection::vec("[abé]{1,4}", 0..4),
        ) {
            prop_assert_eq!(filter(&pieces, &stop), oracle(&pieces.concat(), &stop));
        }

        #[test]
        fn never_lets_the_beginning_of_a_found_stop_string_through(
            pieces in prop::collection::vec("[abé]{0,4}", 0..12),
            stop in prop::collection::vec("[abé]{1,4}", 1..4),
        ) {
            let (end, _) = oracle(&pieces.concat(), &stop);
            let mut filter = StopFilter::new(&stop);
            let mut out = String::new();
            for piece in &pieces {
                filter.push(piece, &mut out);
                prop_assert!(end.starts_with(&out), "{out:?} of {end:?}");
            }
        }
    }

    #[test]
    fn a_filter_that_holds_nothing_back_would_be_caught() {
        let (pieces, stop) = (["ab".to_string(), "c".to_string()], ["bc".to_string()]);
        let eager = pieces.concat();
        assert_eq!(oracle(&eager, &stop), ("a".to_string(), true));
        assert_eq!(filter(&pieces, &stop), ("a".to_string(), true));
        // Passing the first piece on at once gives "ab", which "a" does not begin with.
        assert!(!"a".starts_with(&pieces[0]));
    }
}
