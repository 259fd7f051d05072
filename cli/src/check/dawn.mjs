// Runs exported calls (`wgpu-attention-plan/1`, see `ExportedCall`) on Dawn, Chrome's implementation of WebGPU.
//
//     node dawn.mjs SECONDS FOLDER…
//
// Each folder holds a plan.json with its buffers. Every plan runs twice. The outputs of the first run are written beside
// the plan as result-NAME.bin, the whole buffer each. result.json holds the adapter, whether the second run gave the same
// bits, the milliseconds of the first run, including compilation, and the error if there was one, with `lacks` if the
// adapter lacks a feature or limit. Then one line with the folder is printed. No diagnostic is disabled, and a compiler
// warning is an error. A plan that takes longer than SECONDS is an error too and ends the program, and its line is
// followed by `late`: a hanging plan cannot be stopped, and the program may have to be killed. The caller restarts it with
// the remaining folders. Exit status 3: Dawn has no adapter.

import { readFileSync, writeFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { create, globals } from 'webgpu';

Object.assign(globalThis, globals);
// Dawn crashes if its objects are garbage-collected, so all of them stay reachable.
const kept = (globalThis.kept = []);
const keep = (object) => (kept.push(object), object);

const LIMITS = [
  'maxBufferSize',
  'maxStorageBufferBindingSize',
  'maxStorageBuffersPerShaderStage',
  'maxComputeInvocationsPerWorkgroup',
  'maxComputeWorkgroupSizeX',
  'maxComputeWorkgroupStorageSize',
  'maxComputeWorkgroupsPerDimension',
  'minStorageBufferOffsetAlignment',
];

const backend = { darwin: 'metal', win32: 'd3d12' }[process.platform] ?? 'vulkan';
const gpu = keep(create([`backend=${backend}`]));
const adapter = keep(await gpu.requestAdapter());
if (!adapter) {
  process.exit(3);
}
const limits = Object.fromEntries(LIMITS.map((name) => [name, adapter.limits[name]]));
const { vendor, architecture, device, description, isFallbackAdapter, subgroupMinSize, subgroupMaxSize } = adapter.info;
const about = {
  backend,
  vendor,
  architecture,
  device,
  description,
  software: isFallbackAdapter,
  subgroup_min: subgroupMinSize,
  subgroup_max: subgroupMaxSize,
  features: [...adapter.features].sort(),
  limits,
};

// A device, the pipelines it has compiled, and the first thing that went wrong out of sight.
let open;

async function opened() {
  const requiredFeatures = adapter.features.has('subgroups') ? ['subgroups'] : [];
  const device = keep(await adapter.requestDevice({ requiredFeatures, requiredLimits: limits }));
  const here = { device, pipelines: new Map(), lost: null, uncaptured: null };
  device.addEventListener('uncapturederror', ({ error }) => (here.uncaptured ??= error.message));
  device.lost.then(({ reason, message }) => (here.lost = `the device was lost: ${reason} ${message}`));
  return here;
}

function refused(plan) {
  const missing = plan.features.find((name) => !adapter.features.has(name));
  if (missing) return `the plan needs the feature ${missing}`;
  if (plan.subgroup_min > subgroupMinSize) {
    return `the plan needs subgroups of at least ${plan.subgroup_min} lanes, the adapter's may have ${subgroupMinSize}`;
  }
  for (const [name, needed] of Object.entries(plan.limits)) {
    const fits = name.startsWith('min') ? needed >= limits[name] : needed <= limits[name];
    if (!fits) return `the plan needs ${name} = ${needed}, the adapter has ${limits[name]}`;
  }
  return null;
}

async function pipeline({ device, pipelines }, { kernel, wgsl, bindings }) {
  const known = pipelines.get(wgsl);
  if (known) return known;
  const module = keep(device.createShaderModule({ label: kernel, code: wgsl }));
  const { messages } = await module.getCompilationInfo();
  const complaints = messages
    .filter(({ type }) => type !== 'info')
    .map(({ type, lineNum, message }) => `${type}: ${message} in line ${lineNum}`);
  if (complaints.length) throw new Error(`${kernel}: ${complaints.join('; ')}`);
  const types = { uniform: 'uniform', read: 'read-only-storage', read_write: 'storage' };
  const entries = bindings.map(({ binding, kind }) => ({
    binding,
    visibility: GPUShaderStage.COMPUTE,
    buffer: { type: types[kind] },
  }));
  const layout = keep(device.createBindGroupLayout({ entries }));
  const compiled = keep(
    await device.createComputePipelineAsync({
      label: kernel,
      layout: keep(device.createPipelineLayout({ bindGroupLayouts: [layout] })),
      compute: { module, entryPoint: 'main' },
    }),
  );
  pipelines.set(wgsl, { compiled, layout });
  return { compiled, layout };
}

// Runs a plan and returns the bytes of every output.
async function run(folder, plan, contents) {
  const { device } = open;
  const { STORAGE, UNIFORM, COPY_SRC, COPY_DST, MAP_READ } = GPUBufferUsage;
  const buffer = (size, usage) => keep(device.createBuffer({ size, usage }));
  const buffers = plan.buffers.map(({ size }, n) => {
    const made = buffer(size, STORAGE | UNIFORM | COPY_SRC | COPY_DST);
    // Buffers that are written before they are read may hold anything.
    device.queue.writeBuffer(made, 0, contents[n] || new Uint8Array(size).fill(0xee));
    return made;
  });
  const bound = [];
  for (const step of plan.steps) {
    const { compiled, layout } = await pipeline(open, step);
    const entries = step.bindings.map(({ binding, buffer, offset, size }) => ({
      binding,
      resource: { buffer: buffers[buffer], offset, size },
    }));
    bound.push([compiled, keep(device.createBindGroup({ layout, entries })), step.workgroups]);
  }
  const encoder = keep(device.createCommandEncoder());
  const pass = keep(encoder.beginComputePass());
  for (const [compiled, group, workgroups] of bound) {
    pass.setPipeline(compiled);
    pass.setBindGroup(0, group);
    pass.dispatchWorkgroups(...workgroups);
  }
  pass.end();
  const staging = plan.outputs.map(({ buffer: n }) => {
    const made = buffer(plan.buffers[n].size, MAP_READ | COPY_DST);
    encoder.copyBufferToBuffer(buffers[n], 0, made, 0, plan.buffers[n].size);
    return made;
  });
  device.queue.submit([keep(encoder.finish())]);
  const bytes = [];
  for (const made of staging) {
    await made.mapAsync(GPUMapMode.READ);
    bytes.push(Buffer.from(made.getMappedRange().slice(0)));
    made.unmap();
  }
  [...buffers, ...staging].forEach((made) => made.destroy());
  return bytes;
}

async function both(folder, plan) {
  const contents = plan.buffers.map(({ contents }, n) => contents && new Uint8Array(readFileSync(join(folder, `buffer-${n}.bin`))));
  if (!open || open.lost) open = await opened();
  open.uncaptured = null;
  const scopes = ['out-of-memory', 'validation', 'internal'];
  scopes.forEach((scope) => open.device.pushErrorScope(scope));
  let thrown, first, second, milliseconds;
  try {
    const began = performance.now();
    first = await run(folder, plan, contents);
    milliseconds = performance.now() - began;
    second = await run(folder, plan, contents);
  } catch (error) {
    thrown = error.message;
  }
  const caught = [];
  for (const _ of scopes) {
    const error = await open.device.popErrorScope().catch(({ message }) => ({ message }));
    if (error) caught.push(error.message);
  }
  // An error caught by a scope is the cause of the exception.
  const error = caught[0] ?? open.uncaptured ?? open.lost ?? thrown;
  if (error) return { error };
  first.forEach((bytes, n) => writeFileSync(join(folder, `result-${plan.outputs[n].name}.bin`), bytes));
  return { milliseconds, same_bits: first.every((bytes, n) => bytes.equals(second[n])) };
}

const [seconds, ...folders] = process.argv.slice(2);
for (const folder of folders) {
  const plan = JSON.parse(readFileSync(join(folder, 'plan.json'), 'utf8'));
  const late = `no answer within ${seconds} s`;
  let timer;
  const limit = new Promise((done) => (timer = setTimeout(() => done({ error: late }), seconds * 1000)));
  const lack = plan.schema === 'wgpu-attention-plan/1' ? refused(plan) : `unknown schema ${plan.schema}`;
  const result = lack ? { error: lack, lacks: true } : await Promise.race([both(folder, plan).catch(({ message }) => ({ error: message })), limit]);
  clearTimeout(timer);
  writeFileSync(join(folder, 'result.json'), JSON.stringify({ adapter: about, ...result }));
  const isLate = result.error === late;
  writeSync(1, isLate ? `${folder}\tlate\n` : `${folder}\n`);
  if (isLate) break;
}
// Dawn keeps the process alive.
process.exit(0);
