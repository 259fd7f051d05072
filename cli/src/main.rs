//! `attn`: attention on any GPU, from the command line.

mod array;
mod bench;
mod check;
mod demo;
mod devices;
mod error;
mod files;
mod font;
#[cfg(test)]
mod fuzz;
mod heatmap;
mod mha;
mod options;
mod picture;
mod plot;
mod progress;
mod recognise;
mod run;
mod shader;
mod table;
mod target;
mod tune;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use error::Result;

#[derive(Parser, Debug)]
#[command(
    name = "attn",
    version,
    about = "Attention on any GPU, with a CPU backend",
    after_help = "\
Without a command: a real layer attends over a real sentence, the result is held against \
float64, and a heatmap is written to attn-heatmap.png.

Examples:
  attn                                             the layer and the sentence, on the best adapter
  attn --adapter all                               the same on every adapter and on the CPU backend
  attn devices                                     what this machine has
  attn run in.safetensors -o out.safetensors       attention over your own q, k and v
  attn mha --weights layer.safetensors --heads 8 --query x.npy -o y.npy
  attn check --quick                               whether attention comes out right on every adapter
  attn bench --shape P1 --adapter all              how long calls take
  attn tune --shape P1                             find the fastest kernels, and keep them
  attn plot attention --html page.html             where each head looks, as a page to explore

Exit status: 0 when all went well, 1 for a failure, 2 for a wrong call, 3 where no adapter answers."
)]
struct Cli {
    /// An adapter's index or part of its name, or vulkan, metal, dx12, gl, both (gl:llvmpipe), cpu (the CPU backend), all
    #[arg(long, global = true, value_name = "WHICH")]
    adapter: Option<String>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Attention over your own tensors
    Run(run::RunArgs),
    /// A multi-head layer over your own tensors
    Mha(mha::MhaArgs),
    /// The adapters of this machine
    Devices(devices::DevicesArgs),
    /// Whether attention comes out right: the built-in suite, or a folder of cases
    Check(check::CheckArgs),
    /// How long calls take
    Bench(bench::BenchArgs),
    /// Finds the fastest kernels for a shape on an adapter, and keeps them
    Tune(tune::TuneArgs),
    /// Pictures of attention weights and of positional encodings
    #[command(subcommand)]
    Plot(plot::PlotCommand),
    /// The WGSL of a kernel variant as it runs
    Shader(shader::ShaderArgs),
    /// A completion script for a shell
    #[command(after_help = "Example: attn completions bash > ~/.local/share/bash-completion/completions/attn")]
    Completions { shell: clap_complete::Shell },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match dispatch(&cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            anstream::eprintln!("attn: {error}");
            ExitCode::from(error.exit_status())
        }
    }
}

/// Whether all is well; `false` when the output already says what is not.
fn dispatch(cli: &Cli) -> Result<bool> {
    let adapter = cli.adapter.as_deref();
    match &cli.command {
        None => demo::demo(adapter)?,
        Some(Command::Run(args)) => run::run(args, adapter)?,
        Some(Command::Mha(args)) => mha::mha(args, adapter)?,
        Some(Command::Devices(args)) => devices::devices(args, adapter)?,
        Some(Command::Check(args)) => return check::check(args, adapter),
        Some(Command::Bench(args)) => return bench::bench(args, adapter),
        Some(Command::Tune(args)) => return tune::tune(args, adapter),
        Some(Command::Plot(command)) => plot::plot(command, adapter)?,
        Some(Command::Shader(args)) => shader::shader(args)?,
        Some(Command::Completions { shell }) => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "attn", &mut script);
            // anstream ends quietly where a pipe is closed early.
            anstream::print!("{}", String::from_utf8_lossy(&script));
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        super::Cli::command().debug_assert();
    }
}
