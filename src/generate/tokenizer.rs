//! tokenizer.json: text to ids, and ids to text as they come.

use std::path::{Path, PathBuf};

use crate::checkpoint::read_text;
use crate::error::{Error, Fault, Result};

/// The largest tokenizers have half of it.
const MAX_BYTES: u64 = 1 << 26;

/// A Hugging Face tokenizer.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model directory.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let remedy = "put the model's tokenizer.json there, or pass token ids (--ids)";
        let text = read_text(&path, MAX_BYTES).and_then(|text| {
            text.ok_or_else(|| Fault::new("tokenizer.json", "a tokenizer", "no file", remedy))
        });
        let text = text.map_err(|fault| Error::model(dir.display(), fault))?;
        let refused = |error: tokenizers::Error| {
            let fault = Fault::new("tokenizer.json", "a tokenizer", one_line(&*error), remedy);
            Error::model(dir.display(), fault)
        };
        // Not `from_bytes`, whose type parameter has this crate compile all of the parsing again.
        let mut inner: tokenizers::Tokenizer = text.parse().map_err(refused)?;
        // Left from training, where texts are cut and filled up to one length. As in
        // transformers, a prompt is neither.
        inner.with_truncation(None).map_err(refused)?;
        inner.with_padding(None);
        Ok(Self { path, inner })
    }

    /// The ids of `text`, with the special tokens that the tokenizer puts around a text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, true)
    }

    /// The ids of a text that has its special tokens already: a rendered chat.
    pub fn encode_rendered(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, false)
    }

    fn encode_with(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, special);
        let encoding = encoding.map_err(|error| self.failed("encoded text", &*error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids` without special tokens; ids outside the vocabulary have none.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let text = self.inner.decode(ids, true);
        text.map_err(|error| self.failed("decoded ids", &*error))
    }

    fn failed(&self, expected: &str, error: &(dyn std::error::Error + Send + Sync)) -> Error {
        Error::input(
            self.path.display(),
            expected,
            one_line(error),
            "pass token ids (--ids), or mend the tokenizer",
        )
    }
}

fn one_line(error: &(dyn std::error::Error + Send + Sync)) -> String {
    error.to_string().replace('\n', " ")
}

/// Tokens before the new ones that are decoded with them: enough for a decoder that treats the
/// first token of a text differently.
const CONTEXT: usize = 4;

/// New tokens that may wait for the end of a character. One of four bytes needs four at most.
const MOST_WAITING: usize = 8;

/// Turns ids into text one by one. The pieces, put together, are the text.
///
/// Bytes that are no whole character yet wait, for eight tokens at most.
#[derive(Clone, Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens whose text is out, for context, then those that wait.
    window: Vec<u32>,
    /// How many of the window are context.
    settled: usize,
    /// The text of the window that is out.
    out: String,
}

impl<'a> TextStream<'a> {
    /// The text after `prompt`.
    pub fn new(tokenizer: &'a Tokenizer, prompt: &[u32]) -> Result<Self> {
        let window = prompt[prompt.len().saturating_sub(CONTEXT)..].to_vec();
        Ok(Self {
            tokenizer,
            out: tokenizer.decode(&window)?,
            settled: window.len(),
            window,
        })
    }

    /// Takes the next token and appends to `out` the text that is settled.
    pub fn push(&mut self, id: u32, out: &mut String) -> Result<()> {
        self.window.push(id);
        let text = self.tokenizer.decode(&self.window)?;
        let waiting = self.window.len() - self.settled;
        if text.ends_with(char::REPLACEMENT_CHARACTER) && waiting < MOST_WAITING {
            self.settle_whole(&text, out);
            return Ok(());
        }
        out.push_str(self.rest_of(&text));
        self.restart()
    }

    /// No more tokens will come: appends to `out` the text of those that wait.
    pub fn finish(&mut self, out: &mut String) -> Result<()> {
        let text = self.tokenizer.decode(&self.window)?;
        out.push_str(self.rest_of(&text));
        self.restart()
    }

    /// Lets out what comes before an unfinished character, which shows as at most three
    /// replacement characters.
    fn settle_whole(&mut self, text: &str, out: &mut String) {
        let mut whole = text;
        for _ in 0..3 {
            whole = whole
                .strip_suffix(char::REPLACEMENT_CHARACTER)
                .unwrap_or(whole);
        }
        if let Some(piece) = whole.strip_prefix(self.out.as_str()) {
            out.push_str(piece);
            self.out.push_str(piece);
        }
    }

    /// The part of the window's text that is not out yet. A decoder may have changed the
    /// beginning (bytes turned out to be no character): then by number of characters.
    fn rest_of<'t>(&self, text: &'t str) -> &'t str {
        text.strip_prefix(self.out.as_str()).unwrap_or_else(|| {
            let known = self.out.chars().count();
            let start = text
                .char_indices()
                .nth(known)
                .map_or(text.len(), |(i, _)| i);
            &text[start..]
        })
    }

    /// Makes the newest tokens the context of the next.
    fn restart(&mut self) -> Result<()> {
        self.window
            .drain(..self.window.len().saturating_sub(CONTEXT));
        self.settled = self.window.len();
        self.out = self.tokenizer.decode(&self.window)?;
        Ok(())
    }
}
