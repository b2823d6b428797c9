//! The rotary embedding of a config.json, in the spellings of transformers 4 (`rope_theta`,
//! `rope_scaling`) and 5 (`rope_parameters`).

use serde_json::Value;

use super::config::{RopeConfig, RopeScaling};
use super::json::{Fields, MAX_SIZE, brief};

const TYPES: &str = "default, linear, dynamic, yarn or llama3";

/// Reads `rope_scaling`, else `rope_parameters` (the order of transformers 5), with the theta
/// inside going before the one beside.
pub(super) fn rope(
    config: &Fields<'_>,
    head_dim: Option<usize>,
    max_position_embeddings: Option<usize>,
) -> RopeConfig {
    let theta = |fields: &Fields<'_>| fields.number("rope_theta", "a number above 0", |n| n > 0.0);
    let beside = theta(config);
    whole_head_rotates(config);
    let scaling = config.object("rope_scaling");
    let parameters = config.object("rope_parameters");
    let Some(fields) = scaling.or(parameters) else {
        return RopeConfig {
            theta: beside.unwrap_or(10_000.0),
            scaling: RopeScaling::Default,
        };
    };
    let theta = theta(&fields).or(beside).unwrap_or(10_000.0);
    whole_head_rotates(&fields);
    if let Some((name, value)) = fields.iter().find(|(_, value)| value.is_object()) {
        fields.fault(
            name,
            "one rotary embedding for all layers",
            brief(value),
            "layers that differ are not supported: choose another model",
        );
    }
    RopeConfig {
        theta,
        scaling: scaling_of(&Rope {
            fields: &fields,
            config,
            head_dim,
            max_position_embeddings,
            theta,
        }),
    }
}

fn whole_head_rotates(fields: &Fields<'_>) {
    let name = "partial_rotary_factor";
    if let Some(value) = fields.get(name)
        && value.as_f64() != Some(1.0)
    {
        let remedy = "partial rotation is not supported: choose another model";
        fields.fault(name, "1 or nothing", brief(value), remedy);
    }
}

struct Rope<'a> {
    fields: &'a Fields<'a>,
    config: &'a Fields<'a>,
    head_dim: Option<usize>,
    max_position_embeddings: Option<usize>,
    theta: f64,
}

fn scaling_of(rope: &Rope<'_>) -> RopeScaling {
    let fields = rope.fields;
    let key = match fields.get("rope_type") {
        Some(_) => "rope_type",
        None => "type",
    };
    match fields.text(key) {
        Some("default") => RopeScaling::Default,
        Some("linear") => RopeScaling::Linear {
            factor: rope.factor(),
        },
        Some("dynamic") => {
            // The base grows with exponent head_dim / (head_dim - 2).
            if rope.head_dim == Some(2) {
                let remedy = "choose another rope type";
                fields.fault(key, "a head_dim above 2 with `dynamic`", 2, remedy);
            }
            RopeScaling::Dynamic {
                factor: rope.factor(),
            }
        }
        Some("yarn") => rope.yarn(key),
        Some("llama3") => rope.llama3(),
        Some(other) => {
            let remedy = "use a model with one of these";
            fields.fault(key, TYPES, format_args!("`{other}`"), remedy);
            RopeScaling::Default
        }
        // A wrong type was reported; an absent one means `default`, unless a factor says that
        // something else was meant.
        None => {
            if fields.get(key).is_none() && fields.has("factor") {
                let remedy = "name the type that the factor is for";
                fields.fault("rope_type", TYPES, "none, but a factor", remedy);
            }
            RopeScaling::Default
        }
    }
}

impl Rope<'_> {
    fn factor(&self) -> f64 {
        if self.fields.get("factor").is_none() {
            self.fields.required("factor");
        }
        self.factor_if_any().unwrap_or(1.0)
    }

    fn factor_if_any(&self) -> Option<f64> {
        let holds = |n| (1.0..=65536.0).contains(&n);
        self.fields
            .number("factor", "a number from 1 to 65536", holds)
    }

    /// From the rope object, else from beside it, else the model's context.
    fn original_max_position_embeddings(&self) -> usize {
        let name = "original_max_position_embeddings";
        let inside = self.fields.size(name, MAX_SIZE);
        inside
            .or_else(|| self.config.size(name, MAX_SIZE))
            .or(self.max_position_embeddings)
            .unwrap_or(1)
    }

    fn yarn(&self, key: &str) -> RopeScaling {
        // The bounds of the ramp divide by ln(theta).
        if self.theta <= 1.0 {
            let remedy = "correct rope_theta";
            self.fields
                .fault(key, "a rope_theta above 1 with `yarn`", self.theta, remedy);
        }
        let original_max_position_embeddings = self.original_max_position_embeddings();
        // transformers: a factor of null means the ratio of the two contexts.
        let factor = if matches!(self.explicit_null("factor"), Some(true)) {
            let max = self.max_position_embeddings.unwrap_or(1) as f64;
            (max / original_max_position_embeddings as f64).max(1.0)
        } else {
            self.factor()
        };
        let positive = |name, default| self.truthy(name).unwrap_or(default);
        let (beta_fast, beta_slow) = (positive("beta_fast", 32.0), positive("beta_slow", 1.0));
        if beta_fast < beta_slow {
            let expected = format!("at least beta_slow, {beta_slow}");
            let remedy = "correct one of them";
            self.fields.fault("beta_fast", expected, beta_fast, remedy);
        }
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            attention_factor: self
                .fields
                .number("attention_factor", "a number above 0", |n| n > 0.0),
            beta_fast,
            beta_slow,
            mscale: self.truthy("mscale"),
            mscale_all_dim: self.truthy("mscale_all_dim"),
            truncate: self.fields.flag("truncate").unwrap_or(true),
        }
    }

    fn explicit_null(&self, name: &str) -> Option<bool> {
        let mut fields = self.fields.iter();
        fields
            .find(|(key, _)| *key == name)
            .map(|(_, value)| matches!(value, Value::Null))
    }

    /// A number of which transformers takes 0 for none.
    fn truthy(&self, name: &str) -> Option<f64> {
        let number = self
            .fields
            .number(name, "a number of 0 or more", |n| n >= 0.0);
        number.filter(|&n| n != 0.0)
    }

    fn llama3(&self) -> RopeScaling {
        let number = |name| {
            if self.fields.get(name).is_none() {
                self.fields.required(name);
            }
            self.fields.number(name, "a number above 0", |n| n > 0.0)
        };
        let factor = self.factor();
        let (low, high) = (number("low_freq_factor"), number("high_freq_factor"));
        if let (Some(low), Some(high)) = (low, high)
            && low >= high
        {
            let expected = format!("less than high_freq_factor, {high}");
            let remedy = "correct one of them";
            self.fields.fault("low_freq_factor", expected, low, remedy);
        }
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: low.unwrap_or(1.0),
            high_freq_factor: high.unwrap_or(4.0),
            original_max_position_embeddings: self.original_max_position_embeddings(),
        }
    }
}
