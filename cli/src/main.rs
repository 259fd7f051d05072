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
mod npy;
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
Without a command, attn runs a real layer on a real sentence, compares the result with float64 and writes a heatmap \
to attn-heatmap.png.

Examples:
  attn                                             run the layer on the best adapter
  attn --adapter all                               run it on every adapter and on the CPU backend
  attn devices                                     list the adapters of this machine
  attn run in.safetensors -o out.safetensors       attention over your own q, k and v
  attn mha --weights layer.safetensors --heads 8 --query x.npy -o y.npy
  attn check --quick                               check attention on every adapter
  attn bench --shape P1 --adapter all              measure how long calls take
  attn tune --shape P1                             find the fastest kernels and keep them
  attn plot attention --html page.html             write an interactive page of what each head attends to

Exit status: 0 for success, 1 for a failure, 2 for wrong usage, 3 if no adapter answers."
)]
struct Cli {
    /// An adapter's index or part of its name, a backend (vulkan, metal, dx12, gl), both (gl:llvmpipe), cpu (the CPU
    /// backend) or all
    #[arg(long, global = true, value_name = "WHICH")]
    adapter: Option<String>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Compute attention over your own tensors
    Run(run::RunArgs),
    /// Run a multi-head layer on your own tensors
    Mha(mha::MhaArgs),
    /// List the adapters of this machine
    Devices(devices::DevicesArgs),
    /// Check attention on adapters: the built-in suite, or a folder of cases
    Check(check::CheckArgs),
    /// Measure how long calls take
    Bench(bench::BenchArgs),
    /// Find the fastest kernels for a shape on an adapter, and keep them
    Tune(tune::TuneArgs),
    /// Draw attention weights and positional encodings
    #[command(subcommand)]
    Plot(plot::PlotCommand),
    /// Print the WGSL of a kernel variant as it runs
    Shader(shader::ShaderArgs),
    /// Print a completion script for a shell
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

/// Whether the command succeeded; `false` if the output already says what failed.
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
            // anstream exits quietly if the pipe is closed early.
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
