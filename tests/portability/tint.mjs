// Compiles WGSL with Tint, the compiler of Chrome and everything else that is built on Dawn.
//
//     node tint.mjs PATH…
//
// One line per path: `passed PATH` or `failed PATH MESSAGE`, separated by tabs. No diagnostic is disabled, and a warning
// is a failure too. Unspecialised shader files, and variants with many rules, bind more storage buffers than this adapter
// offers (8, WebGPU's minimum; planning chooses such variants only where an adapter offers enough): their modules are
// compiled, but not their pipelines.

import { readFileSync, writeSync } from 'node:fs';
import { create, globals } from 'webgpu';

Object.assign(globalThis, globals);
// Dawn crashes if its objects are garbage-collected, so all of them stay reachable.
globalThis.gpu = create(['backend=null']);
globalThis.adapter = await gpu.requestAdapter();
globalThis.device = await adapter.requestDevice({ requiredFeatures: ['subgroups'] });

async function faults(path) {
  const source = readFileSync(path, 'utf8');
  // naga refuses the line, browsers ask for it.
  const code = /\bsubgroup(_invocation_id|[A-Z])/.test(source) ? `enable subgroups;\n${source}` : source;
  const lines = code.split('\n');
  device.pushErrorScope('validation');
  const module = device.createShaderModule({ code });
  const { messages } = await module.getCompilationInfo();
  const buffers = code.match(/var<storage/g)?.length ?? 0;
  if (buffers <= device.limits.maxStorageBuffersPerShaderStage && !messages.some(({ type }) => type === 'error')) {
    device.createComputePipeline({ layout: 'auto', compute: { module, entryPoint: 'main' } });
  }
  const error = await device.popErrorScope();
  const complaints = messages
    .filter(({ type }) => type !== 'info')
    .map(({ type, lineNum, message }) => `${type}: ${message} in line ${lineNum}: ${lines[lineNum - 1]?.trim()}`);
  return error && complaints.length === 0 ? [error.message] : complaints;
}

for (const path of process.argv.slice(2)) {
  const found = await faults(path);
  writeSync(1, found.length ? `failed\t${path}\t${found.join('; ').replace(/\s+/g, ' ')}\n` : `passed\t${path}\n`);
}
// Dawn keeps the process alive.
process.exit(0);
