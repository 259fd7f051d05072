//! `attn plot`: pictures are decoded and their cells compared with the library; the page is used in a browser.

use std::collections::HashSet;
use std::path::Path;

use npyz::WriterBuilder;
use wgpu_attention::position::{alibi, sinusoidal, t5};
use wgpu_attention::{Attention, Device, Tensor, Weights};

use crate::browser::Browser;
use crate::kit::{Ran, attn, close, floats, folder, load, numbers, save};

fn plot(folder: &Path, args: &[&str]) -> Ran {
    attn(folder, &[&["plot"], args, &["--adapter", "cpu"]].concat())
}

/// viridis from its smallest to its largest value, as in the pictures.
fn viridis(part: f32) -> String {
    use plotters::prelude::{ColorMap, ViridisRGB};
    let colour = ViridisRGB.get_color(part);
    format!("#{:02X}{:02X}{:02X}", colour.0, colour.1, colour.2)
}

struct Svg(String);

impl Svg {
    fn read(path: &Path) -> Svg {
        Svg(std::fs::read_to_string(path).expect("the file is there"))
    }
    /// Fill colours of the squares of `side` pixels, row by row within each of the `matrices`, which are in reading
    /// order.
    #[track_caller]
    fn cells(&self, side: i32, matrices: usize) -> Vec<String> {
        let document = roxmltree::Document::parse(&self.0).expect("valid XML");
        let number = |node: roxmltree::Node<'_, '_>, name: &str| node.attribute(name).expect("a number").parse::<i32>();
        let rectangles = document.descendants().filter(|node| node.has_tag_name("rect"));
        let mut cells: Vec<([i32; 2], String)> = rectangles
            .filter(|&node| ["width", "height"].iter().all(|name| number(node, name) == Ok(side)))
            .map(|node| (["y", "x"].map(|name| number(node, name).unwrap()), node.attribute("fill").unwrap().into()))
            .collect();
        assert!(!cells.is_empty() && cells.len().is_multiple_of(matrices), "{} cells", cells.len());
        let each = cells.len() / matrices;
        let mut origins = Vec::new();
        for matrix in cells.chunks_exact_mut(each) {
            matrix.sort();
            origins.push(matrix[0].0);
            // Cells neither overlap nor have gaps.
            let ([top, left], [bottom, right]) = (matrix[0].0, matrix[each - 1].0);
            assert_eq!(((bottom - top) / side + 1) * ((right - left) / side + 1), each as i32);
        }
        assert!(origins.is_sorted(), "{origins:?}");
        cells.into_iter().map(|(_, fill)| fill).collect()
    }
    /// The first line of a chart shows `values`: evenly spaced, and higher for larger values.
    #[track_caller]
    fn charts(&self, values: &[f64]) {
        let document = roxmltree::Document::parse(&self.0).expect("valid XML");
        let blue = |node: &roxmltree::Node<'_, '_>| {
            node.has_tag_name("polyline") && node.attribute("stroke") == Some("#0072B2")
        };
        let line = document.descendants().find(blue).expect("a line");
        let points: Vec<Vec<f64>> = (line.attribute("points").expect("points").split_whitespace())
            .map(|point| point.split(',').map(|number| number.parse().expect("a number")).collect())
            .collect();
        assert_eq!(points.len(), values.len());
        let extreme = |sign: f64| (0..values.len()).max_by(|&a, &b| (sign * values[a]).total_cmp(&(sign * values[b])));
        let (least, most) = (extreme(-1.0).unwrap(), extreme(1.0).unwrap());
        assert!(points[least][1] > points[most][1] + 40.0, "larger values are higher");
        let (first, last) = (points[0][0], points[points.len() - 1][0]);
        for (n, point) in points.iter().enumerate() {
            let x = first + n as f64 / (values.len() - 1) as f64 * (last - first);
            let part = (values[n] - values[least]) / (values[most] - values[least]);
            let y = points[least][1] + part * (points[most][1] - points[least][1]);
            assert!((point[0] - x).abs() <= 1.5 && (point[1] - y).abs() <= 1.5, "{point:?} instead of {x}, {y}");
        }
    }
    fn texts(&self) -> Vec<String> {
        let document = roxmltree::Document::parse(&self.0).expect("valid XML");
        let texts = document.descendants().filter(|node| node.has_tag_name("text"));
        texts.filter_map(|node| node.text()).map(|text| text.trim().to_string()).collect()
    }
    /// The opacities of the lines, in file order.
    fn lines(&self) -> Vec<f64> {
        let document = roxmltree::Document::parse(&self.0).expect("valid XML");
        let lines = document.descendants().filter(|node| node.has_tag_name("polyline") || node.has_tag_name("line"));
        lines.map(|node| node.attribute("opacity").expect("an opacity").parse().expect("a number")).collect()
    }
    /// Asserts that every text, at the width of a monospaced font, is within the picture.
    #[track_caller]
    fn nothing_is_cut(&self) {
        let document = roxmltree::Document::parse(&self.0).expect("valid XML");
        let root = document.root_element();
        let size = |name: &str| root.attribute(name).expect("a size").parse::<f64>().expect("a number");
        let (width, height) = (size("width"), size("height"));
        for node in document.descendants().filter(|node| node.has_tag_name("text")) {
            let number = |name: &str| node.attribute(name).expect("a place").parse::<f64>().expect("a number");
            let text = node.text().unwrap_or_default().trim();
            let length = text.chars().count() as f64 * number("font-size") * 0.602;
            let start = match node.attribute("text-anchor") {
                Some("middle") => -length / 2.0,
                Some("end") => -length,
                _ => 0.0,
            };
            // Rotated text reads upwards.
            let (from, to, most) = match node.attribute("transform") {
                Some(_) => (number("y") - start - length, number("y") - start, height),
                None => (number("x") + start, number("x") + start + length, width),
            };
            assert!(from >= 0.0 && to <= most, "\"{text}\" runs from {from} to {to} of {most}");
        }
    }
}

/// Checks that a picture is not nearly empty.
#[track_caller]
fn not_blank(path: &Path, width: u32, height: u32) {
    let picture = image::open(path).expect("a readable picture").to_rgb8();
    assert!(picture.width() >= width && picture.height() >= height, "{:?}", picture.dimensions());
    let colours: HashSet<_> = picture.pixels().map(|pixel| pixel.0).collect();
    assert!(colours.len() > 20, "{} has {} colours", path.display(), colours.len());
    // Text that is cut off would touch the edge.
    for (x, y, pixel) in picture.enumerate_pixels() {
        let edge = x < 4 || y < 4 || x + 4 >= picture.width() || y + 4 >= picture.height();
        assert!(!edge || pixel.0 == [255; 3], "{}: ink at the edge, {x} {y}", path.display());
    }
}

/// Weights `[heads, len_q, len_k]`, each row of sum 1.
fn weights(heads: usize, len_q: usize, len_k: usize) -> Vec<f32> {
    let raw: Vec<f32> = numbers(heads * len_q * len_k, 3.0).iter().map(|x| (3.0 * x).exp()).collect();
    raw.chunks_exact(len_k).flat_map(|row| row.iter().map(|x| x / row.iter().sum::<f32>())).collect()
}

fn save_npy(path: &Path, shape: &[u64], data: &[f32]) {
    let mut bytes = Vec::new();
    let mut writer = npyz::WriteOptions::new().default_dtype().shape(shape).writer(&mut bytes).begin_nd().unwrap();
    writer.extend(data.iter().copied()).unwrap();
    writer.finish().unwrap();
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn every_method_draws_what_the_library_says() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let scaled = |data: &[f32], least: f32, most: f32| -> Vec<String> {
        data.iter().map(|x| viridis((x - least) / (most - least))).collect()
    };
    let range = |data: &[f32]| {
        data.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(least, most), &x| (least.min(x), most.max(x)))
    };
    let draw = |args: &[&str]| {
        let ran = plot(folder.path(), &[&["positions", "-o", "out.svg", "--method"], args].concat());
        ran.succeeded();
        let svg = Svg::read(&at("out.svg"));
        svg.nothing_is_cut();
        svg
    };

    let table = sinusoidal(0, 12, 10).unwrap();
    let svg = draw(&["sinusoidal", "--len", "12", "--dim", "10"]);
    assert_eq!(svg.cells(32, 1), scaled(table.data(), -1.0, 1.0));
    let row = |n: usize| table.data()[n * 10..][..10].iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    svg.charts(&(0..12).map(|n| dot(&row(0), &row(n))).collect::<Vec<_>>());
    for text in ["position", "dimension", "distance", "dot product", "-1.00", "11"] {
        assert!(svg.texts().iter().any(|shown| shown == text), "{text}: {:?}", svg.texts());
    }

    // Two panels; both columns of a pair have the same angle.
    for (interleaved, pair) in [(false, [0, 1, 2, 0, 1, 2]), (true, [0, 0, 1, 1, 2, 2])] {
        let more: &[&str] = if interleaved { &["--interleaved"] } else { &[] };
        let svg = draw(&[&["rotary", "--len", "5", "--dim", "6", "--base", "100"], more].concat());
        let angle = |n: usize| (n / 6) as f64 * 100f64.powf(-2.0 * pair[n % 6] as f64 / 6.0);
        let mut expected: Vec<f32> = (0..30).map(|n| angle(n).cos() as f32).collect();
        expected.extend((0..30).map(|n| angle(n).sin() as f32));
        assert_eq!(svg.cells(32, 2), scaled(&expected, -1.0, 1.0));
        // Σ cos(distance · frequency) over the columns / 2 pairs, of a unit vector.
        let product =
            |n: usize| (0..3).map(|i| (n as f64 * 100f64.powf(-2.0 * i as f64 / 6.0)).cos()).sum::<f64>() / 3.0;
        svg.charts(&(0..5).map(product).collect::<Vec<_>>());
    }

    let bias = alibi::bias(Device::Cpu, 3, 1, 20, 19).unwrap().download().unwrap();
    let (least, most) = range(&bias);
    let svg = draw(&["alibi", "--heads", "3", "--len", "20"]);
    assert_eq!(svg.cells(32, 1), scaled(&bias, least, most));
    svg.charts(&bias[..20].iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
    let bias = alibi::bias(Device::Cpu, 3, 1, 19, 9).unwrap().download().unwrap();
    let (least, most) = range(&bias);
    let svg = draw(&["alibi", "--heads", "3", "--len", "10", "--bidirectional"]);
    assert_eq!(svg.cells(32, 1), scaled(&bias, least, most));

    let learned = numbers(32 * 4, 1.0);
    save(&at("t5.safetensors"), &[floats("bias", &[32, 4], &learned), floats("other", &[1], &[0.0])]);
    let table = Tensor::from_slice(Device::Cpu, &[32, 4], &learned).unwrap();
    for (causal, keys) in [(false, 19), (true, 10)] {
        let mut args = vec!["t5", "--table", "t5.safetensors:bias", "--len", "10", "--heads", "3"];
        args.extend(causal.then_some("--causal"));
        let bias = t5::bias(&table, &t5::Buckets::new(!causal), 1, keys, 9).unwrap().download().unwrap();
        let (least, most) = range(&bias[..3 * keys]);
        assert_eq!(draw(&args).cells(32, 1), scaled(&bias[..3 * keys], least, most));
    }
    let buckets = t5::Buckets { num_buckets: 8, max_distance: 20, bidirectional: false };
    let numbers_of: Vec<f32> = (-11..=0).map(|distance| buckets.bucket(distance).unwrap() as f32).collect();
    let svg = draw(&["t5", "--causal", "--buckets", "8", "--max-distance", "20", "--len", "12"]);
    assert_eq!(svg.cells(32, 1), scaled(&numbers_of, 0.0, range(&numbers_of).1));

    let learned = numbers(9 * 8, 2.0);
    save_npy(&at("table.npy"), &[9, 8], &learned);
    let (least, most) = range(&learned[..7 * 8]);
    let svg = draw(&["learned", "--table", "table.npy", "--len", "7"]);
    assert_eq!(svg.cells(32, 1), scaled(&learned[..7 * 8], least, most));
    let row = |n: usize| learned[n * 8..][..8].iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    let mean = |d: usize| (0..7 - d).map(|n| dot(&row(n), &row(n + d))).sum::<f64>() / (7 - d) as f64;
    svg.charts(&(0..7).map(mean).collect::<Vec<_>>());
}

#[test]
fn positions_of_any_size_are_pictures() {
    let folder = folder();
    for (n, args) in [
        &["sinusoidal"][..],
        &["sinusoidal", "--len", "1", "--dim", "1"],
        &["sinusoidal", "--len", "900", "--dim", "130", "--halves"],
        &["rotary"],
        &["alibi", "--heads", "40", "--len", "300"],
        &["t5"],
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("{n}.png");
        plot(folder.path(), &[&["positions", "--out", &name, "--method"], args].concat()).succeeded();
        not_blank(&folder.path().join(name), 600, 600);
    }
}

#[test]
fn positions_that_cannot_be_drawn_say_why() {
    let folder = folder();
    save_npy(&folder.path().join("table.npy"), &[9, 8], &numbers(72, 0.0));
    let refused = |args: &[&str], status: i32, part: &str| {
        plot(folder.path(), &[&["positions", "--method"], args].concat()).refused(status, part);
    };
    refused(&["spiral"], 2, "rotary");
    refused(&["rotary", "--dim", "7"], 1, "the rotary dimension 7 must be even");
    refused(&["rotary", "--dim", "0"], 1, "must be even and positive");
    refused(&["rotary", "--base", "-1"], 1, "base = -1 must be positive");
    refused(&["rotary", "--base", "0"], 1, "base = 0 must be positive");
    refused(&["sinusoidal", "--dim", "0"], 1, "dim ≥ 1");
    refused(&["sinusoidal", "--len", "0"], 2, "--len 0");
    refused(&["sinusoidal", "--len", "100000000000"], 2, "2048");
    refused(&["alibi", "--heads", "0"], 1, "at least one head");
    refused(&["t5", "--halves"], 2, "--halves does not apply to --method t5; it applies to sinusoidal");
    refused(&["alibi", "--base", "3"], 2, "--base does not apply to --method alibi; it applies to rotary");
    refused(&["learned"], 2, "--table");
    refused(&["learned", "--table", "table.npy", "--len", "10"], 1, "[9, 8]");
    refused(&["learned", "--table", "table.npy", "--dim", "9"], 1, "--dim 9");
    refused(&["t5", "--table", "table.npy"], 1, "num_buckets = 9");
    refused(&["t5", "--table", "table.npy", "--causal", "--heads", "9"], 1, "more than the 8 heads");
    refused(&["t5", "--max-distance", "3"], 1, "max_distance = 3");
    refused(&["sinusoidal", "-o", "out.gif"], 2, ".png or .svg");
    refused(&["sinusoidal", "-o", "no/out.png"], 1, "there is no folder");
    refused(&["sinusoidal", "--len", "800", "--dim", "200", "-o", "out.svg"], 1, "100000");
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(names, ["table.npy"], "nothing is left behind");
}

#[test]
fn the_sentence_is_drawn_in_every_way() {
    let folder = folder();
    let (_, all) = load(&crate::kit::example(), "expected.weights");
    let of = |head: usize, i: usize, j: usize| all[(head * 24 + i) * 24 + j];
    let draw = |args: &[&str]| {
        plot(folder.path(), &[&["attention", "-o", "out.svg"], args].concat()).succeeded();
        let svg = Svg::read(&folder.path().join("out.svg"));
        svg.nothing_is_cut();
        svg
    };
    let colours = |cells: Vec<f64>, most: f64| cells.iter().map(|x| viridis((x / most) as f32)).collect::<Vec<_>>();
    let head = |h: usize| (0..256).map(|n| of(h, n / 16, n % 16)).collect::<Vec<_>>();
    let grid: Vec<f64> = (0..12).flat_map(head).collect();
    let svg = draw(&[]);
    alike(&svg.cells(16, 12), &colours(grid, 1.0));
    assert_eq!(svg.texts().iter().filter(|text| *text == "animal").count(), 3 + 4, "outer sides only");
    let svg = draw(&["--head", "1"]);
    alike(&svg.cells(44, 1), &colours(head(1), 1.0));
    assert!(svg.texts().contains(&".68".to_string()));
    let mean: Vec<f64> = (0..256).map(|n| (head(1)[n] + head(8)[n]) / 2.0).collect();
    let most = (mean.iter().copied().fold(0.0, f64::max) / 0.05).ceil() * 0.05;
    alike(&draw(&["--head", "1,8", "--average"]).cells(44, 1), &colours(mean, most));

    // The opacity of a line is its weight; invisible lines are omitted.
    let visible = |weights: Vec<f64>| {
        let mut weights: Vec<f64> = weights.into_iter().filter(|&weight| weight >= 0.005).collect();
        weights.sort_by(f64::total_cmp);
        weights
    };
    let it = visible((0..16).map(|j| of(1, 10, j)).collect());
    for token in ["it", "10"] {
        let svg = draw(&["--lines", "--token", token, "--head", "1"]);
        close(&svg.lines(), &it, 1e-5);
        assert!(svg.texts().contains(&".68".to_string()));
    }
    let every = visible([1, 8].into_iter().flat_map(head).collect());
    close(&draw(&["--lines", "--head", "1,8"]).lines(), &every, 1e-5);
    for args in
        [&["attention"][..], &["attention", "--head", "3"], &["attention", "--lines"], &["attention", "--average"]]
    {
        plot(folder.path(), args).succeeded();
        not_blank(&folder.path().join("attn-attention.png"), 500, 500);
    }
}

/// Colours that are equal up to the last bits of f32.
#[track_caller]
fn alike(got: &[String], expected: &[String]) {
    assert_eq!(got.len(), expected.len());
    for (n, (a, b)) in got.iter().zip(expected).enumerate() {
        let part = |text: &str, at: usize| i32::from_str_radix(&text[at..at + 2], 16).expect("a colour");
        let off = [1, 3, 5].map(|at| (part(a, at) - part(b, at)).abs()).into_iter().max();
        assert!(off <= Some(1), "cell {n}: {a} instead of {b}");
    }
}

#[test]
fn own_weights_and_own_queries_are_drawn() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let own = weights(6, 4, 5);
    save(&at("own.safetensors"), &[floats("weights", &[2, 3, 4, 5], &own), floats("output", &[1], &[0.0])]);
    save_npy(&at("own.npy"), &[3, 4, 5], &own[60..]);
    let tokens = ["--tokens", "a,b,c,d", "--key-tokens", "v,w,x,y,z"];
    let head = |args: &[&str]| {
        plot(folder.path(), &[&["attention", "-o", "out.svg"], args].concat()).succeeded();
        let svg = Svg::read(&at("out.svg"));
        svg.nothing_is_cut();
        (svg.cells(44, 1), svg.texts())
    };
    let expected = |data: &[f32]| {
        let most = data.iter().copied().fold(0.0, f32::max);
        let step = 10f32.powf(most.log10().floor()) / 2.0;
        let most = (most / step).ceil() * step;
        data.iter().map(|x| viridis(x / most)).collect::<Vec<_>>()
    };
    for args in [
        &["--weights", "own.safetensors", "--batch", "1", "--head", "2"][..],
        &["--weights", "own.safetensors:weights", "--batch", "1", "--head", "2"],
        &["--weights", "own.npy", "--head", "2"],
    ] {
        let (cells, texts) = head(&[args, &tokens].concat());
        alike(&cells, &expected(&own[100..]));
        assert!(["a", "d", "v", "z"].iter().all(|token| texts.iter().any(|text| text == token)), "{texts:?}");
    }
    assert!(head(&["--weights", "own.npy", "--head", "2"]).1.contains(&"4".to_string()), "numbers for tokens");

    let (q, k) = (numbers(2 * 3 * 4, 0.0), numbers(2 * 3 * 4, 50.0));
    save(&at("qk.safetensors"), &[floats("q", &[2, 3, 4], &q), floats("k", &[2, 3, 4], &k)]);
    let tensor = |x: &[f32]| Tensor::from_slice(Device::Cpu, &[1, 2, 3, 4], x).unwrap();
    let attention = Attention::new().causal(wgpu_attention::Align::TopLeft).scale(2.0).weights(Weights::PerHead);
    let truth = attention.forward(&tensor(&q), &tensor(&k), &tensor(&k)).unwrap().weights.unwrap().download().unwrap();
    let call = ["--q", "qk.safetensors:q", "--k", "qk.safetensors:k", "--causal", "top-left", "--scale", "2"];
    alike(&head(&[&call[..], &["--head", "1"]].concat()).0, &expected(&truth[9..]));

    // A mask with the given meaning, and a bias.
    let hides = [false, true, false, true, false, false, false, false, true];
    let bias = numbers(9, 7.0);
    let mask = ("mask", safetensors::Dtype::BOOL, vec![3, 3], hides.map(u8::from).to_vec());
    save(&at("more.safetensors"), &[mask, floats("bias", &[3, 3], &bias)]);
    let device = Device::Cpu;
    let mask = wgpu_attention::Mask::hide_where(Tensor::from_bools(&device, &[3, 3], &hides).unwrap()).unwrap();
    let attention = Attention::new().mask(mask).bias(Tensor::from_slice(&device, &[3, 3], &bias).unwrap());
    let attention = attention.weights(Weights::PerHead);
    let truth = attention.forward(&tensor(&q), &tensor(&k), &tensor(&k)).unwrap().weights.unwrap().download().unwrap();
    let more = ["--attn-mask", "more.safetensors:mask", "--mask", "drop", "--bias", "more.safetensors:bias"];
    alike(&head(&[&call[..4], &more, &["--head", "0"]].concat()).0, &expected(&truth[..9]));
    let unclear = [&["attention"][..], &call[..4], &more[..2]].concat();
    plot(folder.path(), &unclear).refused(2, "--mask keep");
    plot(folder.path(), &[&["attention"][..], &call[..4], &["--mask", "keep"]].concat()).refused(2, "no --attn-mask");
}

#[test]
fn long_and_many_tokens_are_neither_cut_off_nor_overlapping() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let long: Vec<String> = (0..150).map(|n| format!("{n}{}", "abcdefghij".repeat(n % 9))).collect();
    std::fs::write(at("tokens.json"), serde_json::to_string(&long).unwrap()).unwrap();
    save_npy(&at("many.npy"), &[4, 150, 150], &weights(4, 150, 150));
    let many = ["attention", "--weights", "many.npy", "--tokens", "tokens.json"];
    for more in [&["--head", "1"][..], &[], &["--lines", "--token", "7"], &["--average"]] {
        plot(folder.path(), &[&many[..], more, &["-o", "out.svg"]].concat()).succeeded();
        let svg = Svg::read(&at("out.svg"));
        svg.nothing_is_cut();
        // Labels on one side are at least their height apart.
        let document = roxmltree::Document::parse(&svg.0).unwrap();
        let mut sides = std::collections::HashMap::<String, Vec<(f64, f64)>>::new();
        for node in document.descendants().filter(|node| node.has_tag_name("text")) {
            let number = |name: &str| node.attribute(name).unwrap().parse::<f64>().unwrap();
            let (side, place) = match node.attribute("transform") {
                Some(_) => (format!("up {}", number("y")), number("x")),
                None => (format!("level {} {:?}", number("x"), node.attribute("text-anchor")), number("y")),
            };
            sides.entry(side).or_default().push((place, number("font-size")));
        }
        assert!(sides.values().any(|side| side.len() > 10));
        for side in sides.values_mut() {
            side.sort_by(|a, b| a.0.total_cmp(&b.0));
            for pair in side.windows(2) {
                assert!(pair[1].0 - pair[0].0 >= pair[0].1, "{pair:?}");
            }
        }
        plot(folder.path(), &[&many[..], more].concat()).succeeded();
        not_blank(&at("attn-attention.png"), 400, 400);
    }
}

#[test]
fn attention_that_cannot_be_drawn_says_why() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    save_npy(&at("w.npy"), &[2, 3, 4], &weights(2, 3, 4));
    save_npy(&at("scores.npy"), &[1, 2, 2], &[0.5, 0.5, 1.5, -0.5]);
    save_npy(&at("flat.npy"), &[4], &[0.25; 4]);
    save_npy(&at("even.npy"), &[4, 170, 170], &vec![1.0 / 170.0; 4 * 170 * 170]);
    save_npy(&at("empty.npy"), &[0, 2, 2], &[]);
    std::fs::write(at("bad.json"), "[\"a\", 3]").unwrap();
    let refused = |args: &[&str], status: i32, part: &str| {
        plot(folder.path(), &[&["attention"], args].concat()).refused(status, part);
    };
    refused(&["--weights", "scores.npy"], 1, "1.5 at head 0, query 1, key 0; attention weights lie between 0 and 1");
    refused(&["--weights", "flat.npy"], 1, "[4] must be [batch, heads, len_q, len_k]");
    refused(&["--weights", "empty.npy"], 1, "[0, 2, 2] holds no weights");
    refused(&["--weights", "even.npy", "--lines"], 1, "115600 lines are too many to be distinguished (at most 100000)");
    refused(&["--weights", "even.npy", "-o", "out.svg"], 1, "use .png");
    refused(&["--weights", "absent.npy"], 1, "no such file");
    refused(&["--weights", "w.npy", "--tokens", "a,b"], 1, "2 tokens for 3 queries");
    refused(&["--weights", "w.npy", "--tokens", "a,b,c"], 2, "--key-tokens");
    refused(&["--weights", "w.npy", "--key-tokens", "a,b,c"], 1, "3 tokens for 4 keys");
    refused(&["--weights", "w.npy", "--tokens", "bad.json"], 1, "not a JSON list of strings");
    refused(&["--weights", "w.npy", "--head", "2"], 1, "there is no head 2: the weights have 2");
    refused(&["--weights", "w.npy", "--batch", "0"], 2, "--batch needs a batch axis");
    refused(&["--weights", "w.npy", "--causal", "top-left"], 2, "--q and --k");
    refused(&["--weights", "w.npy", "--q", "w.npy", "--k", "w.npy"], 2, "cannot be used with");
    refused(&["--q", "w.npy"], 2, "--k");
    refused(&["--tokens", "a,b"], 2, "--weights");
    refused(&["--token", "it"], 2, "--lines");
    refused(&["--lines", "--token", "cat"], 2, "neither a token nor its number, 0 to 15");
    refused(&["-o", "out.jpg"], 2, ".png or .svg");
    refused(&["--html", "page.txt"], 2, ".html");
    refused(&["--html", "no/page.html"], 1, "there is no folder");
}

const ROW: &str = "(name) => [...document.querySelector(`section[aria-label=\"${name}\"]`).querySelectorAll('.key b')]\
    .map((b) => b.textContent).join(' ')";

/// What the page shows of a head.
#[track_caller]
fn shown(browser: &mut Browser, head: &str) -> Vec<String> {
    browser.text(&format!("({ROW})('{head}')")).split(' ').map(str::to_string).collect()
}

const SENTENCE: [&str; 16] = [
    "[CLS]", "the", "animal", "didn", "'", "t", "cross", "the", "street", "because", "it", "was", "too", "tired", ".",
    "[SEP]",
];

/// Formats a weight as the page does.
fn written(weight: f64) -> String {
    let number = format!("{:.2}", weight as f32);
    number.strip_prefix('0').map(str::to_string).unwrap_or(number)
}

fn button(n: usize) -> String {
    format!("document.querySelectorAll('#queries button')[{n}]")
}

#[test]
fn a_mouse_on_a_token_shows_what_each_head_attends_to() {
    let folder = folder();
    plot(folder.path(), &["attention", "--html", "page.html", "--token", "it"]).succeeded();
    let page = folder.path().join("page.html");
    let (_, all) = load(&crate::kit::example(), "expected.weights");
    let row = |head: usize, i: usize| (0..16).map(|j| written(all[(head * 24 + i) * 24 + j])).collect::<Vec<_>>();
    let browser = &mut Browser::open(&page, 1200, 900);
    assert_eq!(browser.text("document.title"), "all-MiniLM-L6-v2, layer 3 – attention");
    assert_eq!(shown(browser, "head 1"), row(1, 10), "it begins with \"it\"");

    for token in [2, 15, 0] {
        browser.hover(&button(token));
        for head in [0, 1, 11] {
            assert_eq!(shown(browser, &format!("head {head}")), row(head, token), "token {token}, head {head}");
        }
        let mean: Vec<String> =
            (0..16).map(|j| written((0..12).map(|h| all[(h * 24 + token) * 24 + j]).sum::<f64>() / 12.0)).collect();
        assert_eq!(shown(browser, "Mean of the chosen heads"), mean);
    }
    // The larger the weight the darker the box, and its text can be read.
    let colours = "(() => { const light = (c) => { const [r, g, b] = c.match(/\\d+/g).map((x) => x / 255)\
        .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };\
        return [...document.querySelectorAll('section:not([hidden]) .key')].map((e) => { const s = getComputedStyle(e);\
        return [parseFloat(e.querySelector('b').textContent), light(s.backgroundColor), light(s.color)]; }); })()";
    for dark in [false, true] {
        if dark {
            browser.dark();
            browser.wait("getComputedStyle(document.body).backgroundColor === 'rgb(22, 22, 22)'");
            browser.hover(&button(1));
        }
        let mut boxes: Vec<[f64; 3]> = serde_json::from_value(browser.value(colours)).expect("numbers");
        assert_eq!(boxes.len(), 13 * 16);
        boxes.sort_by(|a, b| a[0].total_cmp(&b[0]));
        let (faint, strong) = (boxes[0], boxes[boxes.len() - 1]);
        assert_eq!(faint[1] > strong[1], !dark, "{faint:?} {strong:?}");
        for [weight, paper, ink] in boxes {
            let contrast = (paper.max(ink) + 0.05) / (paper.min(ink) + 0.05);
            assert!(contrast >= 4.5, "contrast {contrast} at weight {weight}");
        }
    }

    // Away from the tokens the pinned one is shown again; a click pins another.
    browser.hover("document.getElementById('title')");
    assert_eq!(shown(browser, "head 1"), row(1, 10));
    browser.click(&button(2));
    browser.hover("document.getElementById('title')");
    assert_eq!(shown(browser, "head 1"), row(1, 2));
    assert_eq!(browser.text(&format!("{}.getAttribute('aria-pressed')", button(2))), "true");

    // Keyboard navigation.
    browser.key("ArrowRight", 39);
    assert_eq!(shown(browser, "head 1"), row(1, 3));
    browser.key("End", 35);
    assert_eq!(shown(browser, "head 1"), row(1, 15));
    let mean = |j: usize| (0..12).map(|h| all[(h * 24 + 15) * 24 + j]).sum::<f64>() / 12.0;
    let mut order: Vec<usize> = (0..16).collect();
    order.sort_by(|&a, &b| mean(b).total_cmp(&mean(a)));
    let names: Vec<String> =
        order[..3].iter().map(|&j| format!("{}\u{a0}{}", SENTENCE[j], &format!("{:.3}", mean(j))[1..])).collect();
    let said = format!("“[SEP]” (15) attends most to {} in the mean of 12 heads.", names.join(", "));
    assert_eq!(browser.text("document.getElementById('said').textContent"), said);
    assert_eq!(browser.text("document.activeElement.textContent"), "[SEP]");

    // Heads can be hidden.
    let visible = "[...document.querySelectorAll('section')].filter((s) => s.offsetHeight > 0).length";
    assert_eq!(browser.value(visible), 13);
    browser.click("document.querySelectorAll('#heads input')[3]");
    assert_eq!(browser.value(visible), 12);
    browser.click("document.getElementById('none')");
    assert_eq!(browser.value(visible), 0);
    browser.click("document.querySelectorAll('#heads input')[1]");
    assert_eq!(browser.value(visible), 1);
    browser.click("document.getElementById('all')");
    assert_eq!(browser.value(visible), 13);

    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
    assert!(browser.requests.iter().all(|url| url.ends_with("page.html")), "{:?}", browser.requests);
}

#[test]
fn hostile_tokens_and_nan_stay_text_on_a_phone() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let tokens =
        ["</script><b>bold</b>", "<img src=x onerror=\"window.hit=1\">", "<!--<script>", "&lt;", "\u{2028}\n", ""];
    std::fs::write(at("tokens.json"), serde_json::to_string(&tokens).unwrap()).unwrap();
    let mut own = weights(2, 6, 6);
    own[0] = f32::NAN;
    own[36..42].fill(f32::NAN);
    save_npy(&at("own.npy"), &[2, 6, 6], &own);
    let title = "<script>window.hit=2</script>";
    let args = ["attention", "--weights", "own.npy", "--tokens", "tokens.json", "--title", title];
    plot(folder.path(), &[&args[..], &["--html", "page.html", "-o", "out.svg"]].concat()).succeeded();
    Svg::read(&at("out.svg")).nothing_is_cut();
    plot(folder.path(), &[&args[..], &["-o", "out.png"]].concat()).succeeded();
    not_blank(&at("out.png"), 300, 200);

    let browser = &mut Browser::open(&at("page.html"), 400, 800);
    assert_eq!(browser.text("document.querySelector('h1').textContent"), title);
    assert_eq!(browser.value("document.querySelectorAll('b:not(.key b), img').length"), 0);
    assert_eq!(browser.text("typeof window.hit"), "undefined");
    assert_eq!(browser.text(&format!("{}.textContent", button(0))), tokens[0]);
    assert_eq!(browser.text(&format!("{}.textContent", button(3))), tokens[3]);
    assert_eq!(browser.text(&format!("{}.textContent", button(4))), "\\u{2028}\\n");
    assert_eq!(shown(browser, "head 1"), ["NaN"; 6]);
    assert_eq!(shown(browser, "head 0")[0], "NaN");
    assert_eq!(shown(browser, "head 0")[1], written(own[1].into()));
    assert!(
        browser
            .text("document.getElementById('said').textContent")
            .ends_with(" (0) has only weights that are NaN in the mean of 2 heads.")
    );
    browser.tap(&button(2));
    browser.wait(&format!("{}.getAttribute('aria-pressed') === 'true'", button(2)));
    let row: Vec<String> = own[12..18].iter().map(|&weight| written(weight.into())).collect();
    assert_eq!(shown(browser, "head 0"), row);
    let overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth";
    assert_eq!(browser.value(overflow), 0, "nothing sticks out of a phone");
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
}

#[test]
fn a_page_that_would_be_too_large_is_refused() {
    let folder = folder();
    save_npy(&folder.path().join("own.npy"), &[20, 500, 500], &vec![0.002; 20 * 500 * 500]);
    plot(folder.path(), &["attention", "--weights", "own.npy", "--html", "page.html"]).refused(1, "--head");
    assert!(!folder.path().join("page.html").exists());
}
