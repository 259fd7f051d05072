//! `attn plot`: pictures of attention weights and of positional encodings.

mod attention;
mod grid;
mod lines;
mod page;
mod positions;
mod seen;

use clap::Subcommand;

use crate::error::Result;

#[derive(Subcommand, Debug)]
pub enum PlotCommand {
    /// Attention weights: every head, one head, their mean, or lines from token to token
    Attention(Box<attention::AttentionPlot>),
    /// A positional encoding, and its values over distance
    Positions(positions::PositionsPlot),
}

pub fn plot(command: &PlotCommand, adapter: Option<&str>) -> Result<()> {
    match command {
        PlotCommand::Attention(args) => attention::plot(args, adapter),
        PlotCommand::Positions(args) => positions::plot(args, adapter),
    }
}
