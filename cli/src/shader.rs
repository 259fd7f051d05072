//! `attn shader`: prints the WGSL of a kernel variant.

use clap::Args;
use wgpu_attention::kernels;

use crate::error::{Error, Result};

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  attn shader                     list all names
  attn shader scores.wgsl         print a file unchanged
  attn shader softmax/lanes1x8    print a variant as it runs")]
pub struct ShaderArgs {
    /// A file (softmax.wgsl) or a kernel variant, as `attn` and `attn devices` print it [default: list all]
    name: Option<String>,
}

pub fn shader(args: &ShaderArgs) -> Result<()> {
    match &args.name {
        None => anstream::println!("{}", kernels::variant_names().join("\n")),
        Some(name) => {
            let source = kernels::variant_source(name).map_err(|error| Error::Usage(error.to_string()))?;
            anstream::print!("{source}");
        }
    }
    Ok(())
}
