//! `attn plot positions`: an encoding as heatmaps, with a chart over distance below.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use plotters::prelude::*;
use wgpu_attention::position::{Pairing, PositionTable, Rotary, RotaryConfig, TokenPositions, alibi, t5};
use wgpu_attention::position::{sinusoidal, sinusoidal_halves};
use wgpu_attention::{Device, Tensor};

use crate::error::{Result, fail, usage};
use crate::files;
use crate::font::{FONT, text_width};
use crate::heatmap::{self, Axis, Cells, MARGIN, Scale, TEXT, TITLE};
use crate::picture::{self, ABOVE, Area, COLOURS, Drawn, LEGEND, Picture, legend, mark, text, upright};
use crate::target;

/// The most positions, columns and heads, at one pixel each.
const MOST: usize = 2048;
/// The most lines that a chart's colours and markers can distinguish.
const MOST_HEADS: usize = 28;

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum MethodWord {
    /// Sines and cosines on the embeddings (Vaswani et al. 2017)
    Sinusoidal,
    /// Rotations of queries and keys (Su et al. 2021)
    Rotary,
    /// A bias linear in the distance, with a slope per head (Press et al. 2022)
    Alibi,
    /// A learned bias per head and bucket of distances (Raffel et al. 2020)
    T5,
    /// A learned vector per position (BERT, GPT-2)
    Learned,
}

#[derive(Args, Debug)]
#[command(after_help = "\
The upper part shows the table: a row per position and a column per dimension (alibi and t5: a row per head and a \
column per distance). The lower part is a chart over the distance between two positions. It shows the dot product of \
their vectors (rotary: of a unit vector of equal entries, rotated to both positions; learned: the mean, minimum and \
maximum over all pairs at that distance), or the bias per head. t5 without --table shows the bucket of each distance. \
If labels do not fit, only every 2nd, 5th, 10th, ... is drawn.

Examples:
  attn plot positions --method sinusoidal --len 128 --dim 64
  attn plot positions --method rotary --len 256 --dim 64 --base 500000 -o rotary.svg
  attn plot positions --method alibi --heads 8 --len 64
  attn plot positions --method t5 --table t5.safetensors:relative_attention_bias.weight --len 128
  attn plot positions --method learned --table bert.safetensors:embeddings.position_embeddings.weight")]
pub struct PositionsPlot {
    /// The encoding to draw
    #[arg(long, value_enum)]
    method: MethodWord,
    /// Positions [default: 128; learned: all of the table]
    #[arg(long, value_name = "N")]
    len: Option<usize>,
    /// Width of a vector or a head [default: 64; learned: the table's width; not used by alibi and t5]
    #[arg(long, value_name = "D")]
    dim: Option<usize>,
    /// Heads [default: 8 for alibi, all heads of the table for t5]
    #[arg(long, value_name = "N")]
    heads: Option<usize>,
    /// Base of the rotary frequencies [default: 10000]
    #[arg(long, allow_negative_numbers = true)]
    base: Option<f64>,
    /// Rotary pairs are adjacent elements (GPT-J) instead of elements of the two halves (Llama)
    #[arg(long)]
    interleaved: bool,
    /// Sinusoids with all sines before all cosines (tensor2tensor)
    #[arg(long)]
    halves: bool,
    /// The learned table: FILE, or FILE:NAME for one of several tensors; learned [positions, dim], t5 [buckets, heads]
    #[arg(long, value_name = "FILE")]
    table: Option<String>,
    /// Only biases of keys before the query (alibi's default)
    #[arg(long)]
    causal: bool,
    /// Biases of keys on both sides (t5's default)
    #[arg(long, conflicts_with = "causal")]
    bidirectional: bool,
    /// Buckets of t5 without a table [default: 32]
    #[arg(long, value_name = "N")]
    buckets: Option<usize>,
    /// Distance from which on t5's keys share a bucket [default: 128]
    #[arg(long, value_name = "N")]
    max_distance: Option<usize>,
    /// The picture file: .png or .svg
    #[arg(short, long, visible_alias = "out", value_name = "FILE", default_value = "attn-positions.png")]
    output: PathBuf,
}

/// One matrix of the encoding.
struct Panel {
    title: &'static str,
    rows: (&'static str, i64, usize),
    columns: (&'static str, i64, usize),
    values: Vec<f32>,
}

/// An encoding's values over distance.
struct Chart {
    x: &'static str,
    y: &'static str,
    /// The first distance; the values follow, one per distance.
    first: i64,
    lines: Vec<(String, Vec<f64>)>,
}

struct Encoding {
    title: String,
    panels: Vec<Panel>,
    scale: Scale,
    chart: Chart,
}

impl PositionsPlot {
    /// Options that do not apply to the method are errors, because they must not be ignored. Every method accepts
    /// --dim, so that a comparison can pass it to every call.
    fn check_options(&self) -> Result<()> {
        use MethodWord::*;
        let given = [
            ("--heads", self.heads.is_some(), &[Alibi, T5][..]),
            ("--base", self.base.is_some(), &[Rotary]),
            ("--interleaved", self.interleaved, &[Rotary]),
            ("--halves", self.halves, &[Sinusoidal]),
            ("--table", self.table.is_some(), &[T5, Learned]),
            ("--causal", self.causal, &[Alibi, T5]),
            ("--bidirectional", self.bidirectional, &[Alibi, T5]),
            ("--buckets", self.buckets.is_some(), &[T5]),
            ("--max-distance", self.max_distance.is_some(), &[T5]),
        ];
        let word = |method: MethodWord| method.to_possible_value().expect("no method is hidden").get_name().to_string();
        for (option, is_given, methods) in given {
            if is_given && !methods.contains(&self.method) {
                let of: Vec<String> = methods.iter().map(|&method| word(method)).collect();
                usage!("{option} does not apply to --method {}; it applies to {}", word(self.method), of.join(", "));
            }
        }
        if self.len == Some(0) {
            usage!("--len 0 draws nothing; it must be at least 1");
        }
        Ok(())
    }

    fn len(&self) -> Result<usize> {
        drawable("--len", self.len.unwrap_or(128))
    }
    fn dim(&self) -> Result<usize> {
        drawable("--dim", self.dim.unwrap_or(64))
    }

    fn encoding(&self, adapter: Option<&str>) -> Result<Encoding> {
        match self.method {
            MethodWord::Sinusoidal => self.sinusoidal(),
            MethodWord::Rotary => self.rotary(&device(adapter)?),
            MethodWord::Alibi => self.alibi(&device(adapter)?),
            MethodWord::T5 => self.t5(adapter),
            MethodWord::Learned => self.learned(&device(adapter)?),
        }
    }

    fn sinusoidal(&self) -> Result<Encoding> {
        let (len, dim) = (self.len()?, self.dim()?);
        let table = if self.halves { sinusoidal_halves(0, len, dim)? } else { sinusoidal(0, len, dim)? };
        let row = |position: usize| &table.data()[position * dim..][..dim];
        Ok(Encoding {
            title: format!("sinusoidal positions, {len} × {dim}"),
            scale: Scale { least: -1.0, most: 1.0 },
            chart: Chart {
                x: "distance",
                y: "dot product",
                first: 0,
                lines: vec![("PE[0] · PE[distance]".into(), (0..len).map(|n| dot(row(0), row(n))).collect())],
            },
            panels: vec![Panel {
                title: "",
                rows: ("position", 0, len),
                columns: ("dimension", 0, dim),
                values: table.data().to_vec(),
            }],
        })
    }

    fn rotary(&self, device: &Device) -> Result<Encoding> {
        let (len, dim) = (self.len()?, self.dim()?);
        let pairing = if self.interleaved { Pairing::Interleaved } else { Pairing::HalfSplit };
        let base = self.base.unwrap_or(10_000.0);
        let config = RotaryConfig::new(dim).base(base).pairing(pairing);
        let tables = config.tables(len)?;
        // Both columns of a pair have the same angle.
        let pair = |d: usize| if self.interleaved { d / 2 } else { d % (dim / 2) };
        let panel = |title, table: &[f32]| Panel {
            title,
            rows: ("position", 0, len),
            columns: ("dimension of the head", 0, dim),
            values: (0..len * dim).map(|n| table[n / dim * (dim / 2) + pair(n % dim)]).collect(),
        };
        let unit = vec![1.0 / (dim as f32).sqrt(); len * dim];
        let x = Tensor::from_slice(device, &[1, 1, len, dim], &unit)?;
        let rotated = Rotary::new(device, &config, len)?.rotate(&x, &TokenPositions::From(0))?.download()?;
        let row = |position: usize| &rotated[position * dim..][..dim];
        Ok(Encoding {
            title: format!("rotary positions, {len} × {dim}, base {base}"),
            panels: vec![panel("cosine", tables[0].data()), panel("sine", tables[1].data())],
            scale: Scale { least: -1.0, most: 1.0 },
            chart: Chart {
                x: "distance",
                y: "dot product",
                first: 0,
                lines: vec![(
                    "of a unit vector of equal entries".into(),
                    (0..len).map(|n| dot(row(0), row(n))).collect(),
                )],
            },
        })
    }

    /// Keys from `first` on, as seen from position 0, and the arguments that the library needs for them.
    fn keys(&self, causal: bool) -> Result<(i64, usize, i64)> {
        let len = self.len()?;
        let before = len as i64 - 1;
        Ok((-before, if causal { len } else { 2 * len - 1 }, before))
    }

    fn alibi(&self, device: &Device) -> Result<Encoding> {
        let heads = drawable("--heads", self.heads.unwrap_or(8))?;
        let (first, keys, offset) = self.keys(!self.bidirectional)?;
        let values = alibi::bias(device, heads, 1, keys, offset)?.download()?;
        biases(format!("ALiBi, {heads} heads"), values, heads, keys, first)
    }

    fn t5(&self, adapter: Option<&str>) -> Result<Encoding> {
        let (first, keys, offset) = self.keys(self.causal)?;
        let mut buckets = t5::Buckets::new(!self.causal);
        buckets.max_distance = self.max_distance.unwrap_or(buckets.max_distance);
        let side = if self.causal { "causal" } else { "bidirectional" };
        let Some(name) = &self.table else {
            if self.heads.is_some() {
                usage!("--heads needs --table FILE with t5, because its biases are learned");
            }
            buckets.num_buckets = self.buckets.unwrap_or(buckets.num_buckets);
            let distances = first..first + keys as i64;
            let numbers = distances.map(|distance| buckets.bucket(distance)).collect::<Result<Vec<_>, _>>()?;
            let values: Vec<f32> = numbers.iter().map(|&bucket| bucket as f32).collect();
            return Ok(Encoding {
                title: format!("T5's {} buckets of distances, {side}", buckets.num_buckets),
                scale: Scale::of(values.iter().copied()),
                chart: Chart {
                    x: DISTANCE,
                    y: "bucket",
                    first,
                    lines: vec![("bucket".into(), values.iter().map(|&value| value.into()).collect())],
                },
                panels: vec![Panel { title: "", rows: ("", 0, 1), columns: (DISTANCE, first, keys), values }],
            });
        };
        if self.buckets.is_some() {
            usage!("--buckets is for t5 without a table; {name} gives the number of buckets");
        }
        let array = files::read_named(name)?;
        let &[rows, all] = array.shape() else {
            fail!("{name} {:?} must be [num_buckets, heads]", array.shape());
        };
        buckets.num_buckets = rows;
        let heads = drawable("--heads", self.heads.unwrap_or(all))?;
        if heads > all {
            fail!("--heads {heads} is more than the {all} heads of {name} {:?}", array.shape());
        }
        let table = array.upload("the table", &device(adapter)?)?;
        let mut values = t5::bias(&table, &buckets, 1, keys, offset)?.download()?;
        values.truncate(heads * keys);
        biases(format!("T5's relative biases, {heads} heads, {rows} buckets, {side}"), values, heads, keys, first)
    }

    fn learned(&self, device: &Device) -> Result<Encoding> {
        let Some(name) = &self.table else {
            usage!("--method learned needs --table FILE: the trained table [positions, dim]");
        };
        let table = PositionTable::learned(&files::read_named(name)?.upload("the table", device)?)?;
        let (shape, data) = (table.tensor().shape(), table.tensor().download()?);
        let (rows, dim) = (shape[0], drawable("the width of the table", shape[1])?);
        if self.dim.is_some_and(|asked| asked != dim) {
            fail!("--dim {} is not the width of {name} {shape:?}", self.dim.unwrap_or_default());
        }
        let len = self.len.unwrap_or(rows);
        if len > rows || len == 0 || dim == 0 {
            fail!(
                "{len} positions of {name} {shape:?} cannot be drawn: the table must hold at least 1 and at least --len"
            );
        }
        drawable("--len", len)?;
        let data = &data[..len * dim];
        let row = |position: usize| &data[position * dim..][..dim];
        let of_pairs = |distance: usize| -> Vec<f64> {
            (0..len - distance).map(|position| dot(row(position), row(position + distance))).collect()
        };
        let [mut mean, mut least, mut most] = [vec![], vec![], vec![]];
        for products in (0..len).map(of_pairs) {
            mean.push(products.iter().sum::<f64>() / products.len() as f64);
            least.push(products.iter().copied().fold(f64::INFINITY, f64::min));
            most.push(products.iter().copied().fold(f64::NEG_INFINITY, f64::max));
        }
        Ok(Encoding {
            title: format!("learned positions, {len} × {dim}"),
            scale: Scale::of(data.iter().copied()),
            chart: Chart {
                x: "distance",
                y: "dot product",
                first: 0,
                lines: vec![("mean of all pairs".into(), mean), ("least".into(), least), ("most".into(), most)],
            },
            panels: vec![Panel {
                title: "",
                rows: ("position", 0, len),
                columns: ("dimension", 0, dim),
                values: data.to_vec(),
            }],
        })
    }
}

const DISTANCE: &str = "distance: the key's position minus the query's";

fn device(adapter: Option<&str>) -> Result<Device> {
    let target = target::target(adapter)?;
    target.announce();
    Ok(target.device)
}

fn drawable(what: &str, count: usize) -> Result<usize> {
    if count > MOST {
        usage!("{what} = {count} is more than the {MOST} that a picture can show");
    }
    Ok(count)
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

fn biases(title: String, values: Vec<f32>, heads: usize, keys: usize, first: i64) -> Result<Encoding> {
    if heads == 0 {
        fail!("the table has no heads to draw");
    }
    let lines = values.chunks_exact(keys).take(MOST_HEADS).enumerate();
    let lines = lines.map(|(head, row)| (format!("head {head}"), row.iter().map(|&x| x.into()).collect())).collect();
    Ok(Encoding {
        title,
        scale: Scale::of(values.iter().copied()),
        chart: Chart {
            x: DISTANCE,
            y: if heads > MOST_HEADS { "bias of the first heads" } else { "bias" },
            first,
            lines,
        },
        panels: vec![Panel { title: "", rows: ("head", 0, heads), columns: (DISTANCE, first, keys), values }],
    })
}

pub fn plot(args: &PositionsPlot, adapter: Option<&str>) -> Result<()> {
    args.check_options()?;
    picture::check_output(&args.output)?;
    let encoding = args.encoding(adapter)?;
    picture::write(&args.output, &encoding)?;
    anstream::println!("{} written to {}", encoding.title, args.output.display());
    Ok(())
}

/// The gap between panels, and between a panel and its colour bar.
const BETWEEN: i32 = 34;
const CHART: i32 = 420;
const ROW: i32 = 30;

impl Encoding {
    fn cells<'a>(&self, panel: &'a Panel) -> Cells<'a> {
        let ((_, row, rows), (_, column, columns)) = (panel.rows, panel.columns);
        let room = 840 / self.panels.len() as i32;
        Cells {
            values: &panel.values,
            rows: Axis::Numbers { first: row, len: rows },
            columns: Axis::Numbers { first: column, len: columns },
            cell: (heatmap::cell(columns, room, 32), heatmap::cell(rows, 420, 32)),
            scale: self.scale,
        }
    }
    /// The width of a panel and its labels to the left.
    fn panel_room(&self, panel: &Panel) -> (i32, i32) {
        let cells = self.cells(panel);
        let caption = text_width(panel.columns.0, TEXT).max(text_width(panel.title, TEXT));
        (TEXT + 14 + cells.row_room(), cells.width().max(caption))
    }
    fn nan(&self) -> bool {
        self.panels.iter().flat_map(|panel| &panel.values).any(|value| value.is_nan())
    }
    /// Where the cells begin.
    fn top(&self) -> i32 {
        let above = if self.panels.iter().any(|panel| !panel.title.is_empty()) { TEXT + 8 } else { 0 };
        MARGIN + TITLE + 20 + above
    }
    /// Where the chart begins.
    fn chart_top(&self) -> i32 {
        let below = |panel: &Panel| {
            let cells = self.cells(panel);
            let upright = text_width(panel.rows.0, TEXT);
            (cells.height() + cells.column_room() + 14 + TEXT).max(cells.height().max(upright))
        };
        let lowest = self.panels.iter().map(below).max().unwrap_or(0);
        self.top() + lowest.max(self.bar_height() + TEXT + if self.nan() { 2 * TEXT } else { 0 }) + 2 * MARGIN
    }
    fn bar_height(&self) -> i32 {
        let cells = self.panels.iter().map(|panel| self.cells(panel).height()).max().unwrap_or(0);
        cells.max(heatmap::bar_height(false))
    }
    /// The number of legend columns, and the width of one.
    fn legend(&self, width: i32) -> (i32, i32) {
        let widest = self.chart.lines.iter().map(|(name, _)| text_width(name, TEXT)).max().unwrap_or(0);
        let each = LEGEND + widest + 2 * MARGIN;
        (((width - 2 * MARGIN) / each).max(1), each)
    }
}

impl Picture for Encoding {
    fn size(&self) -> (i32, i32) {
        let panels: i32 = self
            .panels
            .iter()
            .map(|panel| {
                let (left, width) = self.panel_room(panel);
                left + width + BETWEEN
            })
            .sum();
        let least = 720.max(text_width(&self.title, TITLE)).max(text_width(self.chart.x, TEXT) + 200);
        let width = (panels + heatmap::bar_room(&self.scale)).max(least) + 2 * MARGIN;
        let (columns, _) = self.legend(width);
        let rows = (self.chart.lines.len() as i32 + columns - 1) / columns;
        (width, self.chart_top() + CHART + rows * ROW + 2 * MARGIN)
    }
    fn marks(&self) -> usize {
        let cells: usize = self.panels.iter().map(|panel| panel.values.len()).sum();
        cells + self.chart.lines.len()
    }

    fn draw<B: DrawingBackend>(&self, root: &Area<B>) -> Drawn<B> {
        let (width, _) = self.size();
        text(root, &self.title, (width / 2, MARGIN), TITLE, ABOVE, BLACK)?;
        let top = self.top();
        let mut left = MARGIN;
        for panel in &self.panels {
            let cells = self.cells(panel);
            let (before, room) = self.panel_room(panel);
            upright(root, panel.rows.0, (left, top + cells.height() / 2), TEXT, ABOVE)?;
            left += before;
            let middle = left + cells.width() / 2;
            text(root, panel.title, (middle, top - TEXT - 8), TEXT, ABOVE, BLACK)?;
            cells.draw(root, (left, top))?;
            if !panel.rows.0.is_empty() {
                cells.row_labels(root, (left, top))?;
            }
            cells.column_labels(root, (left, top))?;
            let below = top + cells.height() + cells.column_room() + 14;
            let middle = middle.max(left + text_width(panel.columns.0, TEXT) / 2);
            text(root, panel.columns.0, (middle, below), TEXT, ABOVE, BLACK)?;
            left += room + BETWEEN;
        }
        heatmap::bar(root, (left, top), self.bar_height(), &self.scale, self.nan())?;
        let (_, rest) = root.split_vertically(self.chart_top());
        let (upper, lower) = rest.split_vertically(CHART);
        self.chart.draw(&upper)?;
        let (columns, each) = self.legend(width);
        for (n, (name, _)) in self.chart.lines.iter().enumerate() {
            let at = (2 * MARGIN + n as i32 % columns * each, MARGIN + n as i32 / columns * ROW + ROW / 2);
            legend(&lower, name, at, n, TEXT)?;
        }
        Ok(())
    }
}

impl Chart {
    fn draw<B: DrawingBackend>(&self, area: &Area<B>) -> Drawn<B> {
        let finite = || self.lines.iter().flat_map(|(_, values)| values).copied().filter(|value| value.is_finite());
        let (least, most) =
            finite().fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), x| (least.min(x), most.max(x)));
        let (least, most) = if least <= most { (least, most) } else { (0.0, 1.0) };
        // The frame would hide a line along the edge.
        let room = if most > least { (most - least) * 0.05 } else { most.abs().max(1.0) * 0.05 };
        let count = self.lines.iter().map(|(_, values)| values.len()).max().unwrap_or(1);
        let x = self.first as f64..(self.first + count as i64 - 1).max(self.first + 1) as f64;
        let style = TextStyle::from((FONT, f64::from(TEXT)).into_font());
        let number = |value: &f64| heatmap::number(*value, most - least);
        let widest = [least - room, most + room].map(|end| text_width(&number(&end), TEXT)).into_iter().max();
        let mut chart = ChartBuilder::on(area)
            .margin_left(MARGIN)
            .margin_right(2 * MARGIN)
            .margin_top(MARGIN / 2)
            .x_label_area_size(3 * TEXT + 10)
            .y_label_area_size(widest.unwrap_or(0).max(4 * TEXT) + TEXT + 20)
            .build_cartesian_2d(x, least - room..most + room)?;
        chart
            .configure_mesh()
            .bold_line_style(RGBColor(0xdd, 0xdd, 0xdd))
            .light_line_style(TRANSPARENT)
            .x_labels(9)
            .y_labels(7)
            .x_label_formatter(&|distance| heatmap::number(*distance, count as f64))
            .y_label_formatter(&number)
            .label_style(style.clone())
            .axis_desc_style(style)
            .x_desc(self.x)
            .y_desc(self.y)
            .draw()?;
        for (n, (_, values)) in self.lines.iter().enumerate() {
            let colour = COLOURS[n % COLOURS.len()];
            let points = || values.iter().enumerate().map(|(at, &y)| ((self.first + at as i64) as f64, y));
            // NaN leaves a gap.
            let points: Vec<(f64, f64)> = points().collect();
            for run in points.split(|(_, y)| !y.is_finite()) {
                chart.draw_series(LineSeries::new(run.iter().copied(), colour.stroke_width(2)))?;
            }
            // About eight markers per line, offset from those of other lines.
            let every = (values.len() / 8).max(1);
            let start = n * every / self.lines.len();
            for &point in points.iter().skip(start).step_by(every).filter(|(_, y)| y.is_finite()) {
                mark(chart.plotting_area(), point, n)?;
            }
        }
        Ok(())
    }
}
