//! Chat templates: messages to the text that a model was tuned on.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind, context};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter};

use crate::checkpoint::read_text;
use crate::error::{Error, Fault, Result};

/// A template, or the tokenizer's configuration with it, of more bytes is not one.
const MAX_BYTES: u64 = 1 << 24;

/// Texts of more bytes are no prompts: the longest contexts have some four megabytes.
const MAX_RENDERED: usize = 1 << 24;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// "system", "user", "assistant" or what else the template knows.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
        }
    }

    /// A message of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// A message of the system.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }

    /// A message of the assistant.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }
}

/// A model's chat template, a Jinja program as Hugging Face transformers runs it.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// The file that it came from.
    source: String,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// The template of a model directory: chat_template.jinja, or the entry `chat_template`
    /// of chat_template.json or of tokenizer_config.json.
    pub fn open(dir: &Path) -> Result<Self> {
        let tokenizer_config = read_json(dir, "tokenizer_config.json")?.unwrap_or_default();
        let (source, template) = match read(dir, "chat_template.jinja")? {
            Some(template) => ("chat_template.jinja", Some(template)),
            None => match read_json(dir, "chat_template.json")? {
                Some(json) => ("chat_template.json", default_template(&json)),
                None => ("tokenizer_config.json", default_template(&tokenizer_config)),
            },
        };
        let Some(template) = template else {
            let fault = Fault::new(
                source,
                "a chat_template",
                "none",
                "use a model that is tuned for chats, or a plain prompt (without --chat)",
            );
            return Err(Error::model(dir.display(), fault));
        };
        Self::new(
            format!("{}/{source}", dir.display()),
            template,
            special_token(&tokenizer_config, "bos_token"),
            special_token(&tokenizer_config, "eos_token"),
        )
    }

    /// The template `template`; `source` names it in errors.
    pub fn new(
        source: impl Into<String>,
        template: String,
        bos_token: String,
        eos_token: String,
    ) -> Result<Self> {
        let mut this = Self {
            environment: Environment::new(),
            source: source.into(),
            bos_token,
            eos_token,
        };
        let environment = &mut this.environment;
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        // A template is a program from the model's author: bound what it may compute.
        environment.set_fuel(Some(10_000_000));
        let loaded = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .and_then(|syntax| {
                environment.set_syntax(syntax);
                environment.add_template_owned("chat", template)
            });
        loaded.map_err(|error| this.fault("a Jinja template", &error))?;
        Ok(this)
    }

    /// The text of `messages`, with `add_generation_prompt` up to where the assistant's answer
    /// begins. It contains its special tokens: encode it without adding any.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let template = self.environment.get_template("chat");
        let rendered = template.and_then(|template| {
            template.render(context! {
                messages => Value::from(minijinja::value::Serde(messages)),
                bos_token => &self.bos_token,
                eos_token => &self.eos_token,
                add_generation_prompt,
                tools => (),
                documents => (),
            })
        });
        let text = rendered.map_err(|error| self.fault("a template for these messages", &error))?;
        if text.len() > MAX_RENDERED {
            return Err(Error::input(
                &self.source,
                format_args!("a template that makes at most {MAX_RENDERED} bytes"),
                text.len(),
                "mend the template or shorten the messages",
            ));
        }
        Ok(text)
    }

    fn fault(&self, expected: &str, error: &minijinja::Error) -> Error {
        let found = match error.line() {
            Some(line) => format!("{error} (line {line})"),
            None => error.to_string(),
        };
        Error::input(
            &self.source,
            expected,
            found.replace('\n', " "),
            "mend the template or the messages, or use a plain prompt",
        )
    }
}

fn read(dir: &Path, name: &str) -> Result<Option<String>> {
    read_text(&dir.join(name), MAX_BYTES).map_err(|fault| Error::model(dir.display(), fault))
}

fn read_json(dir: &Path, name: &str) -> Result<Option<serde_json::Value>> {
    let Some(text) = read(dir, name)? else {
        return Ok(None);
    };
    serde_json::from_str(&text).map(Some).map_err(|error| {
        let fault = Fault::new(name, "JSON", error, "fetch the file again");
        Error::model(dir.display(), fault)
    })
}

/// A string, or of a list of `{name, template}` the one that is named "default".
fn default_template(json: &serde_json::Value) -> Option<String> {
    let entry = &json["chat_template"];
    let entry = match entry.as_array() {
        Some(list) => list
            .iter()
            .find(|entry| entry["name"] == "default")
            .map(|entry| &entry["template"])?,
        None => entry,
    };
    entry.as_str().map(String::from)
}

/// A token as a string, or as an object with its `content`.
fn special_token(json: &serde_json::Value, name: &str) -> String {
    let token = &json[name];
    let text = token.as_str().or_else(|| token["content"].as_str());
    text.unwrap_or_default().to_string()
}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`, as transformers defines the filter;
/// Jinja's own would escape for HTML.
fn tojson(value: &Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        Some(indent) => {
            let spaces = vec![b' '; indent.min(64)];
            let formatter = PrettyFormatter::with_indent(&spaces);
            let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
            value.serialize(&mut serializer)
        }
        None => {
            let mut serializer = serde_json::Serializer::with_formatter(&mut out, Python);
            value.serialize(&mut serializer)
        }
    };
    let bad = |error: &dyn std::fmt::Display| {
        minijinja::Error::new(ErrorKind::BadSerialization, error.to_string())
    };
    written.map_err(|error| bad(&error))?;
    let text = String::from_utf8(out).map_err(|error| bad(&error))?;
    Ok(Value::from_safe_string(text))
}

/// Python's separators: ", " and ": ".
struct Python;

impl Formatter for Python {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// The current time in UTC, in the directives that templates use.
fn strftime_now(format: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    strftime(format, now.map_or(0, |now| now.as_secs()))
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
];

/// `seconds` since 1970 (UTC) by `format`; unknown directives stay as they are.
fn strftime(format: &str, seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let weekday = DAYS[(days % 7) as usize];
    let month_name = MONTHS[month as usize - 1];
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match rest.next() {
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&format!("{:02}", year % 100)),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(weekday),
            Some('a') => out.push_str(&weekday[..3]),
            Some('H') => out.push_str(&format!("{:02}", second / 3600)),
            Some('M') => out.push_str(&format!("{:02}", second / 60 % 60)),
            Some('S') => out.push_str(&format!("{:02}", second % 60)),
            Some('%') => out.push('%'),
            other => {
                out.push('%');
                out.extend(other);
            }
        }
    }
    out
}

/// Year, month and day of the proleptic Gregorian calendar, `days` after 1970-01-01.
fn civil(days: u64) -> (u64, u64, u64) {
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let (mut year, mut rest) = (1970 + days / 146_097 * 400, days % 146_097);
    loop {
        let length = if leap(year) { 366 } else { 365 };
        if rest < length {
            break;
        }
        rest -= length;
        year += 1;
    }
    let february = if leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if rest < length {
            break;
        }
        rest -= length;
        month += 1;
    }
    (year, month, rest + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str, messages: &[Message]) -> Result<String> {
        let token = |name: &str| name.to_string();
        ChatTemplate::new("test", token(template), token("<s>"), token("</s>"))?
            .render(messages, true)
    }

    #[test]
    fn renders_what_transformers_renders() {
        // Block lines leave no trace: trim_blocks and lstrip_blocks.
        let template = "{{ bos_token }}\n{% for m in messages %}\n    \
                        {% if m['role'] == 'user' %}\n[{{ m.content.strip() }}]\n    {% endif %}\n\
                        {% endfor %}\n{% if add_generation_prompt %}>{% endif %}";
        let messages = [Message::system("x"), Message::user(" hi <b> ")];
        let text = render(template, &messages).unwrap();
        assert_eq!(text, "<s>\n[hi <b>]\n>");
    }

    #[test]
    fn tojson_writes_as_python_does() {
        let template = "{{ messages | tojson }}|{{ [1, {'a': '<é>'}] | tojson(indent=2) }}";
        assert_eq!(
            render(template, &[Message::user("it's <b>é</b>")]).unwrap(),
            "[{\"role\": \"user\", \"content\": \"it's <b>é</b>\"}]|\
             [\n  1,\n  {\n    \"a\": \"<é>\"\n  }\n]"
        );
    }

    #[test]
    fn a_template_that_objects_is_an_error_that_says_why() {
        let error = render("{{ raise_exception('roles must alternate') }}", &[]).unwrap_err();
        assert!(error.is_input());
        assert!(
            error.to_string().contains("roles must alternate"),
            "{error}"
        );
        let error = render("{% for %}", &[]).unwrap_err();
        assert!(error.to_string().contains("line 1"), "{error}");
        let endless =
            "{% for i in range(100000) %}{% for i in range(100000) %}{% endfor %}{% endfor %}";
        assert!(render(endless, &[]).is_err());
        let flood = "{{ 'ab'.replace('a', 'b' * 9000).replace('b', 'b' * 9000) }}";
        let error = render(flood, &[]).unwrap_err().to_string();
        assert!(error.contains("at most 16777216 bytes"), "{error}");
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        let date = |seconds| strftime("%a %A %d %b %B %Y %y-%m %H:%M:%S %% %q", seconds);
        assert_eq!(
            date(0),
            "Thu Thursday 01 Jan January 1970 70-01 00:00:00 % %q"
        );
        // 2000-02-29 12:34:56, a leap day of a century.
        assert_eq!(
            date(951_827_696),
            "Tue Tuesday 29 Feb February 2000 00-02 12:34:56 % %q"
        );
        // 2024-12-31 23:59:59.
        assert!(date(1_735_689_599).starts_with("Tue Tuesday 31 Dec December 2024"));
    }
}
