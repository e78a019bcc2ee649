// What ONNX Runtime answers on Node, by greedy decoding around a session or in one call.
// given: { graph, kind, ids, tokens }; ids: a row for each prompt.
export async function askSession(runtime, given) {
  const session = await runtime.InferenceSession.create(given.graph);
  const whole = (values) => new runtime.Tensor("int64", BigInt64Array.from(values.map(BigInt)), [1, values.length]);
  const run = async (feeds) => {
    const known = Object.entries(feeds).filter(([name]) => session.inputNames.includes(name));
    return await session.run(Object.fromEntries(known));
  };
  const answers = [];
  for (const ids of given.ids) {
    const ones = (length) => whole(new Array(length).fill(1));
    if (given.kind === "encoder") {
      const types = whole(new Array(ids.length).fill(0));
      const out = await run({ input_ids: whole(ids), attention_mask: ones(ids.length), token_type_ids: types });
      const states = out[session.outputNames[0]];
      answers.push({ dims: states.dims, data: Array.from(states.data) });
      continue;
    }
    let cache = emptyCache(runtime, session);
    let step = ids;
    const said = [];
    while (said.length < given.tokens) {
      const length = ids.length + said.length;
      const places = whole(step.map((_, i) => length - step.length + i));
      const out = await run({ input_ids: whole(step), attention_mask: ones(length), position_ids: places, ...cache });
      const past = Object.keys(out).filter((name) => name.startsWith("present"));
      cache = Object.fromEntries(past.map((name) => [name.replace("present", "past_key_values"), out[name]]));
      said.push(greatest(out.logits));
      step = said.slice(-1);
    }
    answers.push(said);
  }
  return answers;
}

function emptyCache(runtime, session) {
  const cache = {};
  for (const { name, shape } of session.inputMetadata) {
    if (name.startsWith("past_key_values")) {
      cache[name] = new runtime.Tensor("float32", new Float32Array(0), [1, shape[1], 0, shape[3]]);
    }
  }
  return cache;
}

// The token of the last position: logits are (1, positions, vocabulary).
function greatest(logits) {
  const size = logits.dims.at(-1);
  const row = logits.data.slice(-size);
  return row.indexOf(Math.max(...row));
}
