//! The report as a page: one HTML file that works offline.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Value, json};

use super::data::{Output, Report, visible};
use crate::error::Result;
use crate::files::{self, json_number as number};

const TEMPLATE: &str = include_str!("report.html");

pub fn write(path: &Path, report: &Report) -> Result<()> {
    files::write_page(path, TEMPLATE, &data(report))
}

/// Deduplicated strings: ids and reasons recur on every adapter.
#[derive(Default)]
struct Texts {
    list: Vec<String>,
    places: HashMap<String, usize>,
}

impl Texts {
    fn put(&mut self, text: &str) -> usize {
        if let Some(&at) = self.places.get(text) {
            return at;
        }
        self.places.insert(text.to_string(), self.list.len());
        // Keep line breaks, so that compiler messages stay readable.
        self.list.push(text.split('\n').map(visible).collect::<Vec<_>>().join("\n"));
        self.list.len() - 1
    }

    fn put_some(&mut self, text: &Option<String>) -> Value {
        text.as_ref().map_or(Value::Null, |text| self.put(text).into())
    }
}

/// The report as the page reads it: rows without member names, strings as indices into a list.
fn data(report: &Report) -> Value {
    let mut texts = Texts::default();
    let adapters: Vec<Value> = report
        .adapters
        .iter()
        .map(|adapter| {
            json!({
                "name": visible(&adapter.name),
                "label": adapter.label(),
                "backend": visible(&adapter.backend),
                "kind": visible(&adapter.kind),
                "pci": format!("{:#06x}:{:#06x}", adapter.vendor, adapter.device),
                "driver": adapter.driver_label(),
                "compiler": visible(&adapter.shader_compiler),
                "subgroups": adapter.subgroups,
                "features": adapter.features.iter().map(|name| visible(name)).collect::<Vec<_>>(),
                "limits": adapter.limits.iter().map(|(name, value)| json!([visible(name), value.to_string()])).collect::<Vec<_>>(),
                "observed": adapter.observed,
                "ended": adapter.ended.as_deref().map(visible),
                "seconds": adapter.seconds,
            })
        })
        .collect();
    let results: Vec<Value> = report
        .results
        .iter()
        .map(|result| {
            let outputs: Vec<Value> = result.outputs.iter().map(|output| row(output, &mut texts)).collect();
            let kernels: Vec<usize> = result.kernels.iter().map(|kernel| texts.put(kernel)).collect();
            let messages: Vec<usize> = result.messages.iter().map(|message| texts.put(message)).collect();
            let repro = report.repro(result);
            let split = repro.find(" --repro ").unwrap_or(repro.len());
            json!([
                result.adapter,
                texts.put(&result.id),
                texts.put(&result.op),
                texts.put(&result.variant),
                texts.put(&result.storage),
                result.status.word(),
                texts.put_some(&result.issue),
                texts.put_some(&result.reason),
                outputs,
                result.same_bits,
                kernels,
                texts.put_some(&result.why),
                messages,
                result.workgroup,
                result.subgroup,
                number(result.milliseconds),
                [texts.put(&repro[..split]), texts.put(&repro[split..])],
                texts.put_some(&result.note),
            ])
        })
        .collect();
    json!({
        "version": visible(&report.version),
        "wgpu": visible(&report.wgpu),
        "naga": visible(&report.naga),
        "cases": report.cases(),
        "date": visible(&report.date),
        "host": visible(&report.host),
        "adapters": adapters,
        "results": results,
        "texts": texts.list,
    })
}

fn row(output: &Output, texts: &mut Texts) -> Value {
    json!([
        texts.put(&output.name),
        texts.put(&output.against),
        output.ok,
        output.count,
        number(output.max_abs),
        number(output.allowed),
        number(output.ulps),
        number(output.nmse),
        number(output.nmse_allowed),
        output.worst,
        number(output.got),
        number(output.expected),
        output.nans,
    ])
}
