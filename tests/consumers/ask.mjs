// What transformers.js answers, on Node and in a page: for each prompt its tokens; or numbers, the states of an
// encoder, or the logits of a prompt or of the first token that a decoder reads.
// given: { place, kind, prompts, tokens, numbers, together, options }: options of from_pretrained; together: whether
// the prompts are one batch.
const CLASSES = {
  decoder: "AutoModelForCausalLM",
  encoder: "AutoModel",
  "encoder-decoder": "AutoModelForSeq2SeqLM",
  speech: "AutoModelForSpeechSeq2Seq",
};

export async function ask(library, given) {
  const { place, kind, prompts, tokens, numbers, together, options } = given;
  const reader = await library[kind === "speech" ? "AutoProcessor" : "AutoTokenizer"].from_pretrained(place);
  const model = await library[CLASSES[kind]].from_pretrained(place, options);
  const answers = [];
  for (const prompt of together ? [prompts] : prompts) {
    const inputs = await reader(kind === "speech" ? Float32Array.from(prompt) : prompt, { padding: true });
    if (numbers || kind === "encoder") {
      const starts = ["encoder-decoder", "speech"].includes(kind);
      const first = () => new library.Tensor("int64", [BigInt(model.config.decoder_start_token_id)], [1, 1]);
      const out = await model(starts ? { ...inputs, decoder_input_ids: first() } : inputs);
      const values = (out.logits ?? Object.values(out)[0]).to("float32");
      answers.push({ dims: values.dims, data: Array.from(values.data) });
      continue;
    }
    const said = await model.generate({ ...inputs, max_new_tokens: tokens, do_sample: false });
    const start = { decoder: inputs.input_ids?.dims[1], "encoder-decoder": 1, speech: 1 }[kind];
    const row = said.tolist()[0].slice(start).map(Number);
    // Whisper's generate in transformers leaves out the token that ends a text.
    if (kind === "speech" && row.at(-1) === model.config.eos_token_id) row.pop();
    answers.push(row);
  }
  await model.dispose();
  return answers;
}
