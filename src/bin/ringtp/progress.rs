//! The bar while a model loads.

use std::io::{IsTerminal, stderr};
use std::sync::Arc;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ringtp::Result;
use ringtp::generate::{Llm, LlmBuilder, OpenModel};

/// The bar of a loading model, on standard error where that is a terminal.
pub(crate) struct LoadBar(ProgressBar);

impl LoadBar {
    /// A bar, and a builder that moves it.
    pub(crate) fn new(builder: LlmBuilder) -> (Self, LlmBuilder) {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        let style = ProgressStyle::with_template(
            "loading {bar:40} {binary_bytes} of {binary_total_bytes} ({eta})",
        );
        if let Ok(style) = style {
            bar.set_style(style);
        }
        let moved = bar.clone();
        let progress: ringtp::llama::Progress = Arc::new(move |bytes| moved.inc(bytes as u64));
        (Self(bar), builder.progress(progress))
    }

    /// Loads `model` on `tp` ranks behind the bar.
    pub(crate) fn load(self, model: OpenModel, tp: usize) -> Result<Llm> {
        // Each rank reports each weight.
        self.0.set_length((model.weight_bytes()? * tp) as u64);
        if stderr().is_terminal() {
            self.0.set_draw_target(ProgressDrawTarget::stderr());
        }
        let llm = model.load();
        self.0.finish_and_clear();
        llm
    }
}
