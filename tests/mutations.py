"""Deliberate faults, each with the test that must catch it: run by test_mutations.py, listed in README.md."""

from dataclasses import dataclass

MATRIX = "tests/matrix/test_matrix.py::test_matrix_merged_equals_unmerged"
BITSANDBYTES = "tests/quantization/test_bitsandbytes.py"
FORMATS = "tests/quantization/test_formats.py"

CERTIFICATE = "tests/validation/test_certificate.py"
DEVIATION = "tests/validation/test_deviation.py"
NOISE = "tests/validation/test_noise_floors.py"


@dataclass(frozen=True)
class Mutation:
    """In `file` of the package, `old` becomes `new`; `caught_by` is a pytest node id."""

    name: str
    file: str
    old: str
    new: str
    caught_by: str


MUTATIONS = (
    Mutation(
        "the scaling of lora_bias is dropped", "adapters/updates.py",
        "return weight + self.scaling * self.addend[rows]", "return weight + self.addend[rows]",
        f"{MATRIX}[lora lora_bias on llama]",
    ),
    Mutation(
        "alpha/r for alpha/√r", "adapters/config.py",
        "return alpha / math.sqrt(rank) if self.fields.use_rslora else alpha / rank", "return alpha / rank",
        f"{MATRIX}[lora rslora on llama]",
    ),
    Mutation(
        "the last matching pattern decides, not the first", "adapters/config.py",
        "for key, value in (pattern or {}).items():", "for key, value in reversed((pattern or {}).items()):",
        f"{MATRIX}[lora patterns on llama]",
    ),
    Mutation(
        "the transpose of a square Conv1D is forgotten", "adapters/module.py",
        "return self.is_conv1d if outputs == inputs else shape == (inputs, outputs)",
        "return outputs != inputs and shape == (inputs, outputs)",
        f"{MATRIX}[lora on gpt2]",
    ),
    Mutation(
        "B of fused experts is taken as expert-major", "adapters/experts.py",
        "up.reshape(-1, rank, experts).permute(2, 0, 1)", "up.reshape(-1, experts, rank).permute(1, 0, 2)",
        f"{MATRIX}[lora experts on mixtral]",
    ),
    Mutation(
        "the wrappers of two expert parameters are exchanged", "adapters/experts.py",
        "innermost_first = sorted(wrappers, reverse=True)", "innermost_first = sorted(wrappers)",
        f"{MATRIX}[lora experts on qwen2 moe]",
    ),
    Mutation(
        "DoRA forgets the norm of V", "adapters/dora.py",
        "torch.linalg.norm(changed, dim=1)", "torch.ones(len(changed))",
        f"{MATRIX}[dora on llama]",
    ),
    Mutation(
        "AdaLoRA divides by r, not by the initial rank", "adapters/adalora.py",
        '/ (init_r + 1e-5)', '/ (whole(config, "r", file.where) + 1e-5)',
        f"{MATRIX}[adalora pruned on llama]",
    ),
    Mutation(
        "trained token rows are added, not put in place", "adapters/tokens.py",
        "return weight.index_copy(0, places,", "return weight.index_add(0, places,",
        f"{MATRIX}[lora tokens on llama]",
    ),
    Mutation(
        "IA3 scales inputs for outputs", "adapters/ia3.py",
        "by_rows = not feedforward", "by_rows = feedforward",
        f"{MATRIX}[ia3 on bert]",
    ),
    Mutation(
        "LoHa adds its two products", "adapters/loha.py",
        "(first * second)", "(first + second)",
        f"{MATRIX}[loha on llama]",
    ),
    Mutation(
        "the factors of LoKr are exchanged", "adapters/lokr.py",
        "self.first[index // len(self.second)], self.second[index % len(self.second)]",
        "self.first[index % len(self.first)], self.second[index // len(self.first)]",
        f"{MATRIX}[lokr on llama]",
    ),
    Mutation(
        "VeRA forgets λd", "adapters/vera.py",
        "ranks[: shared.rank, None] * down", "down",
        f"{MATRIX}[vera on llama]",
    ),
    Mutation(
        "VeRA draws B before A", "adapters/vera.py",
        "for shape in ((halves * rank, widest), (outputs, rank)):",
        "for shape in ((outputs, rank), (halves * rank, widest)):",
        f"{MATRIX}[vera regenerated on llama]",
    ),
    Mutation(
        "OFT rotates the other way", "adapters/oft.py",
        "RotationUpdate(blocks.mT if embedding else blocks)", "RotationUpdate(blocks if embedding else blocks.mT)",
        f"{MATRIX}[oft on llama]",
    ),
    Mutation(
        "PiSSA's residual is not taken out of the base", "adapters/lora.py",
        "weight - taken + low.scaling", "weight + low.scaling",
        f"{MATRIX}[lora pissa on llama]",
    ),
    Mutation(
        "a trained head stays tied", "merging/planning/ties.py",
        "alike = all(_do_the_same(a, b, adapters) for a, b in pairwise(lists))", "alike = True",
        "tests/merging/test_against_peft.py::test_merge_equals_unmerged_model"
        "[lora on the head, tied]",
    ),
    Mutation(
        "replicated layers share the first layer's update", "merging/planning/replication.py",
        '= f"{prefix}{old}{rest}"', '= f"{prefix}0{rest}"',
        f"{MATRIX}[lora replication on llama]",
    ),
    Mutation(
        "the delta is rounded before it is added", "merging/running/tensor.py",
        "rounded = round_once(result, dtype)", "rounded = weight.to(dtype) + (result - weight).to(dtype)",
        "tests/properties/test_merge_properties.py::test_low_rank_update_is_rounded_once",
    ),
    Mutation(
        "the two nibbles of a byte are exchanged", "quantization/bitsandbytes.py",
        "torch.stack((book.repeat_interleave(16), book.repeat(16)), dim=1)",
        "torch.stack((book.repeat(16), book.repeat_interleave(16)), dim=1)",
        f"{BITSANDBYTES}::test_bnb4_other_block_sizes_match[64]",
    ),
    Mutation(
        "the offset of double quantization is forgotten", "quantization/bitsandbytes.py",
        '* spread + float(self.state.nested_offset or 0)', "* spread",
        f"{BITSANDBYTES}::test_bnb4_other_block_sizes_match[128]",
    ),
    Mutation(
        "GPTQ's zeros are taken as they are stored", "quantization/gptq.py",
        "zeros = (zeros + 1) & mask", "zeros = zeros & mask",
        f"{FORMATS}::test_gptq_matches_definition[False-False-32-4]",
    ),
    Mutation(
        "AWQ's outputs are not interleaved", "quantization/awq.py",
        "ORDER = (0, 2, 4, 6, 1, 3, 5, 7)", "ORDER = (0, 1, 2, 3, 4, 5, 6, 7)",
        f"{FORMATS}::test_awq_matches_definition[True-32]",
    ),
    Mutation(
        "top-5 is asked of the other model twice", "validation/comparing/logits.py",
        "one, two = best(a), best(b)",
        "one, two = best(b), best(b)",
        f"{CERTIFICATE}::test_compare_logits_matches_definition",
    ),
    Mutation(
        "KL is taken the other way round", "validation/comparing/logits.py",
        "kl = torch.linalg.vecdot(p, lost) / p.sum(-1) - p_sum",
        "kl = torch.linalg.vecdot(torch.softmax(other, -1), -lost) + p_sum - 2 * exponentials(other.clone())[1]",
        f"{CERTIFICATE}::test_compare_logits_matches_definition",
    ),
    Mutation(
        "perplexity predicts the token that it has seen", "validation/effect/effect.py",
        "blocks_of(ids.roll(-1))", "blocks_of(ids)",
        f"{CERTIFICATE}::test_validate_reports_perplexities_and_loaded_checks",
    ),
    Mutation(
        "the merged model as loaded is the one in fp32", "validation/stages.py",
        "load_as_stored(task.merged)", "load_as_stored(task.merged).float()",
        f"{CERTIFICATE}::test_validate_reports_perplexities_and_loaded_checks",
    ),
    Mutation(
        "the floor as loaded forgets the arithmetic of the type", "validation/comparing/decoder.py",
        "self._floor(where, self._rounding, (narrow,))", "self._floor(where, self._rounding)",
        f"{CERTIFICATE}::test_validate_reports_perplexities_and_loaded_checks",
    ),
    Mutation(
        "weights without an adapter stay unrounded in the noise", "validation/comparing/noise.py",
        "            return weight.to(dtype).float()\n",
        "            return weight\n",
        f"{CERTIFICATE}::test_noise_is_removed_and_reaches_every_weight",
    ),
    Mutation(
        "--tolerance does not reach KL", "validation/comparing/thresholds.py",
        "factor * math.sqrt(floor.kl)) **", "FACTOR * math.sqrt(floor.kl)) **",
        f"{CERTIFICATE}::test_tolerance_scales_every_threshold",
    ),
    Mutation(
        "greedy tokens are never unexplained", "validation/comparing/thresholds.py",
        "if not d.gap <= tie < math.inf]", "if d.gap > 100 * tie]",
        f"{CERTIFICATE}::test_validate_shows_first_diverging_token",
    ),
    Mutation(
        "a text's last piece of one token is kept", "validation/comparing/texts.py",
        "if len(piece) > 1]", "if len(piece) > 0]",
        f"{CERTIFICATE}::test_perplexity_reads_long_text_in_windows",
    ),
    Mutation(
        "the merged module gets other inputs", "validation/comparing/deviation.py",
        "actual = list(tensors_of(module(*args, **kwargs)))",
        "actual = list(tensors_of(module(*(1.5 * a for a in args), **kwargs)))",
        f"{DEVIATION}::test_deviation_value_is_of_module_alone",
    ),
    Mutation(
        "tensors of other modules are blamed, too", "validation/comparing/deviation.py",
        "first.floor, _within(first.module, weight_errors))", "first.floor, tuple(weight_errors))",
        f"{DEVIATION}::test_deviation_names_first_module_of_forward",
    ),
    Mutation(
        "modules without weights are not looked at", "validation/comparing/deviation.py",
        "if first is None and not weight_errors:", "if first is None and weight_errors:",
        f"{DEVIATION}::test_deviation_finds_changed_setting",
    ),
    Mutation(
        "only the sampled columns of a low-rank update are compared", "validation/comparing/tensors.py",
        "one_by_one = whole_probes(exact, actual, bound)", "one_by_one = iter([probe.inputs])",
        f"{DEVIATION}::test_compare_tensors_sees_unsampled_column[lora-bfloat16]",
    ),
    Mutation(
        "no random combinations of what is dear to ask", "validation/comparing/tensors.py",
        "errors.append(_combined(weight, exact, actual, bound, generator))", "errors.append(errors[0])",
        f"{DEVIATION}::test_compare_tensors_sees_unsampled_column[oft-bfloat16]",
    ),
    Mutation(
        "the error names the worst tensor of all", "pipeline.py",
        "return (*(result.deviation.tensors if result.deviation else ()), *result.weight_errors)",
        "return result.weight_errors",
        f"{DEVIATION}::test_gate_error_names_first_module_tensor",
    ),
    Mutation(
        "an adapter in a shared folder holds what it did not change", "onnx_export/weights/shared_folder.py",
        "if any(hashes[p.tensor] != shared.found.hashes[p.tensor] for p in w.recipe.pieces)",
        "if any(hashes[p.tensor] == shared.found.hashes[p.tensor] for p in w.recipe.pieces)",
        "tests/onnx_export/test_shared.py::test_shared_adapter_holds_only_changed_weights",
    ),
    Mutation(
        "a failed adapter leaves its data in the shared folder", "onnx_export/weights/shared_folder.py",
        "left = () if data.exists() else (data,)",
        "left: tuple[Path, ...] = ()",
        "tests/onnx_export/test_shared.py::test_shared_failure_keeps_folder",
    ),
    Mutation(
        "the scaling of a plugged-in LoRA is dropped", "workflows/pluggable.py",
        "(low_rank.scaling * low_rank.left).T.numpy()",
        "low_rank.left.T.numpy()",
        "tests/onnx_export/test_pluggable.py::test_pluggable_adapter_matches_peft[plain]",
    ),
    Mutation(
        "slots keep the size of the rank that they were made with", "onnx_export/graphs/slots.py",
        "between.shape = ir.Shape([*between.shape[:-1], rank])",
        "pass",
        "tests/onnx_export/test_pluggable.py::test_pluggable_adapter_matches_peft[wide]",
    ),
    Mutation(
        "the pieces of a weight are turned onto one another", "onnx_export/weights/layout.py",
        "turned[:, at : at + len(rows)] = rows.T\n                at += len(rows)",
        "turned[:, at : at + len(rows)] = rows.T",
        "tests/onnx_export/test_agreement.py::test_decoder_fp32_agrees_with_transformers",
    ),
    Mutation(
        "every expert multiplies with the first one's matrix", "onnx_export/engines/dynamo_passes/experts.py",
        "values = weight.const_value.numpy()[i]",
        "values = weight.const_value.numpy()[0]",
        "tests/onnx_export/test_experts.py::test_expanded_products_multiply_each_share_with_its_expert",
    ),
    Mutation(
        "an expert is read from the place of its number in lines", "onnx_export/weights/reading.py",
        "return Piece(piece.tensor, piece.start * each, piece.stop * each)",
        "return Piece(piece.tensor, piece.start, piece.start + (piece.stop - piece.start) * each)",
        "tests/onnx_export/test_experts.py::test_data_file_of_an_expert_is_its_matrix_turned",
    ),
    Mutation(
        "experts lie one line apart from where transformers puts them", "onnx_export/engines/merged_parameters.py",
        "yield Piece(name, first, last + 1)",
        "yield Piece(name, first, last)",
        "tests/onnx_export/test_experts.py::test_merged_parameters_of_experts_are_lines_of_the_checkpoint",
    ),
    Mutation(
        "dynamic frequencies stay those of the first length", "onnx_export/engines/dynamo_passes/rope.py",
        "length = torch.max(position_ids) + 1",
        "length = torch.max(position_ids) * 0 + 1",
        "tests/onnx_export/test_rope.py::test_traceable_embedding_at_any_length_is_transformers_own",
    ),
    Mutation(
        "angles of rotary embeddings are rounded to half precision", "onnx_export/engines/dynamo_passes/halving.py",
        "        if _gather(node, before, positions) and (",
        "        if not _gather(node, before, positions) and (",
        "tests/onnx_export/test_halving.py::test_halving_of_rotary_angles_keeps_them_in_fp32",
    ),
    Mutation(
        "tensors that no weight is made of may change", "onnx_export/weights/reuse.py",
        "for name in sorted(fixed & before.keys()):",
        "for name in sorted(fixed - before.keys()):",
        "tests/onnx_export/test_reweight.py::test_reweight_changed_tensor_without_recipe_is_refused",
    ),
    Mutation(
        "where weights lie is not compared with the map", "onnx_export/weights/reuse.py",
        "if weight is None or (weight.offset, weight.nbytes) != (",
        "if weight is None and (weight.offset, weight.nbytes) != (",
        "tests/onnx_export/test_reweight.py::test_reweight_graph_disagreeing_with_map_is_refused",
    ),
    Mutation(
        "a wrong fusion is let through", "onnx_export/graphs/fusions.py",
        "if not error <= limit:",
        "if error < 0:",
        "tests/onnx_export/test_against_plain.py::test_fused_graph_with_wrong_fusion_is_refused",
    ),
    Mutation(
        "the proof lets a wrong graph through", "validation/proof/judge.py",
        "return self.difference <= self.allowed",
        "return self.difference <= 1e9",
        "tests/onnx_export/test_proof.py::test_proof_of_wrong_graph_is_refused_with_figure_and_module",
    ),
    Mutation(
        "an engine that fails ends the export", "onnx_export/engines/attempts.py",
        "                if attempt.stage == _CHECK:\n                    break\n                continue",
        "                raise",
        "tests/onnx_export/test_attempts.py::test_engine_refusing_failing_or_wrong_gives_way",
    ),
    Mutation(
        "weights that no file has are drawn at random", "merging/planning/completeness.py",
        "    if not missing:\n        return",
        "    return",
        "tests/onnx_export/test_attempts.py::test_missing_weight_is_refused_by_name",
    ),
    Mutation(
        "a pattern that keeps nothing is taken", "onnx_export/refusals.py",
        "if not chosen(names, [pattern]):",
        "if chosen(names, [pattern]) is None:",
        "tests/onnx_export/test_activations.py::test_activations_keep_pattern_without_match_is_refused",
    ),
    Mutation(
        "static activations are dynamic", "onnx_export/quantize/activations.py",
        'if how.activations == "static":\n        feeds',
        'if how.activations == "none":\n        feeds',
        "tests/onnx_export/test_activations.py::test_activations_int8_encoder_agrees[static-QuantizeLinear]",
    ),
    Mutation(
        "bfloat16 becomes fp16 by its bits", "onnx_export/weights/dtypes.py",
        'return np.take(_halves_of_bfloat16(), values.view(np.uint16), mode="clip")',
        "return values.view(np.float16)",
        "tests/onnx_export/test_casting.py::test_cast_every_half_to_other_half[float16-bf16]",
    ),
    Mutation(
        "a streamed merge takes other rows", "merging/running/stream.py",
        "return work.compute(start, stop)", "return work.compute(0, stop - start)",
        "tests/merging/test_streamed.py::test_streamed_merge_equals_merged_folder[plain]",
    ),
    Mutation(
        "Whisper's sounds are not padded to thirty seconds", 'validation/kinds/signals.py',
        'padding = "max_length" if hasattr(extractor, "chunk_length") else True',
        "padding = True",
        "tests/validation/test_sounds.py",
    ),
    Mutation(
        "verify passes over the options without a merged folder", "workflows/verifying.py",
        'for folder in (run / "merged", run):',
        'for folder in (run / "merged",):',
        "tests/end_to_end/test_one_pass.py::test_verify_one_pass_compares_manifest_with_certificate",
    ),
    Mutation(
        'shared weights count like two', 'onnx_export/graphs/canonical.py',
        '_digest("tensor", words, str(uses.get(value, 0)))',
        '_digest("tensor", words)',
        'tests/onnx_export/test_identity.py::test_identity_compares_shapes_attributes_and_sharing',
    ),
    Mutation(
        'the wiring of a graph is not hashed', 'onnx_export/graphs/canonical.py',
        '                *("" if value is None else values.get(value, "") for value in node.inputs),\n',
        '',
        'tests/onnx_export/test_identity.py::test_identity_compares_wiring_and_placement',
    ),
    Mutation(
        'the order of nodes is hashed', 'onnx_export/graphs/canonical.py',
        '*sorted(n.digest for n in self.nodes)',
        '*(n.digest + str(i) for i, n in enumerate(self.nodes))',
        'tests/onnx_export/test_identity.py::test_identity_ignores_names_order_and_values',
    ),
    Mutation(
        'a wider type is no warning', 'onnx_export/graphs/identity.py',
        'if sum(theirs.values()) > _WIDER * sum(ours.values()):',
        'if sum(ours.values()) > _WIDER * sum(theirs.values()):',
        'tests/onnx_export/test_identity.py::test_identity_detects_other_type',
    ),
    Mutation(
        'a cache in place is trusted unseen', 'benchmarking/sessions.py',
        'return bool(np.abs(in_place - expected).max() <= _SAME * np.abs(expected).max())',
        'return True',
        'tests/benchmarking/test_benchmark_run.py::test_in_place_cache_with_other_logits_is_not_used',
    ),
    Mutation(
        'the adapter that is plugged in is not bound', 'benchmarking/sessions.py',
        'made | (self._adapter.values if self._adapter else {})',
        'made',
        'tests/benchmarking/test_benchmark_run.py::test_plugged_adapter_is_in_every_run',
    ),
    Mutation(
        'the control is not held up', 'benchmarking/sessions.py',
        '(now() - start) * (1 + share)',
        '(now() - start)',
        'tests/benchmarking/test_benchmark_run.py::test_control_without_slower_graph_is_delayed_base',
    ),
    Mutation(
        'a control that is not slower is no matter', 'benchmarking/statistics.py',
        'if control is not None and not control.low > 1:',
        'if control is not None and control.low <= 0:',
        'tests/benchmarking/test_benchmark_statistics.py::test_verdict_of_intervals',
    ),
    Mutation(
        "PyTorch's cache grows with every call", 'benchmarking/pytorch.py',
        'cache.crop(-shape.tokens)',
        'pass',
        'tests/benchmarking/test_benchmark_run.py::test_pytorch_arm_repeats_unmerged_model',
    ),
    Mutation(
        'a slower verdict of identical graphs is believed at once', 'benchmarking/study.py',
        'if again.verdict == "slower":\n        return again',
        'if first.verdict == "slower":\n        return first',
        'tests/benchmarking/test_benchmark_run.py::test_run_identical_graphs_need_confirmation_in_other_sessions',
    ),
    Mutation(
        'graphs that differ are measured at one size', 'benchmarking/benchmark.py',
        'return GRIDS["standard"], "grid standard',
        'return GRIDS["quick"], "grid standard',
        'tests/benchmarking/test_benchmark_one_graph.py::'
        'test_run_graph_slower_in_some_shapes_is_found_by_default[at batch 8]',
    ),
    Mutation(
        'a check of few blocks counts as a passed test', 'benchmarking/statistics.py',
        '(found == "equivalent" and not ended_early)',
        'found == "equivalent"',
        'tests/benchmarking/test_benchmark_statistics.py::test_verdict_on_one_graph_needs_no_test',
    ),
    Mutation(
        'a check ends although merged looks slower', 'benchmarking/measure.py',
        'return not ratio_interval(logs, rng, _PLANNING_RESAMPLES).low > 1',
        'return True',
        'tests/benchmarking/test_benchmark_measure.py::'
        'test_check_of_a_slower_arm_goes_on_to_least_blocks_of_a_test',
    ),
    Mutation(
        'constants in data files are not compared', 'onnx_export/graphs/identity.py',
        'if name in steering or not a.dtype.is_floating_point() or a.size <= SMALL',
        'if not name',
        'tests/onnx_export/test_identity.py::'
        'test_equal_files_are_one_graph_unless_a_constant_that_counts_differs',
    ),
    Mutation(
        'p95 is p90', 'benchmarking/statistics.py',
        'PERCENTILES = (0.50, 0.95, 0.99)',
        'PERCENTILES = (0.50, 0.90, 0.99)',
        'tests/benchmarking/test_benchmark_run.py::test_percentiles_and_rates_match_samples',
    ),
    Mutation(
        'percentiles are drawn call by call', 'benchmarking/statistics.py',
        '[np.quantile(times[rows], PERCENTILES) for rows in',
        '[np.quantile(rng.choice(times.ravel(), times.size), PERCENTILES) for rows in',
        'tests/benchmarking/test_benchmark_statistics.py::test_percentiles_resample_whole_blocks',
    ),
    Mutation(
        'an idle GPU counts as throttled', 'benchmarking/gpus.py',
        '"SwPowerCap": "power limit",',
        '"SwPowerCap": "power limit",\n    "GpuIdle": "idle",',
        'tests/benchmarking/test_benchmark_conditions.py::test_gpu_is_described_and_read',
    ),
    Mutation(
        "our own work counts as others'", 'benchmarking/conditions.py',
        'passed["busy"] - passed["own"]',
        'passed["busy"]',
        'tests/benchmarking/test_benchmark_conditions.py::test_readings_cover_time_since_last',
    ),
    Mutation(
        'a slower benchmark is no failure', 'workflows/latency.py',
        'if result.verdict == "slower":',
        'if result.verdict == "slow":',
        'tests/end_to_end/test_benchmark_command.py::test_benchmark_slower_merged_graph_fails_gate',
    ),
    Mutation(
        'buffers that all arms share count for the first', 'benchmarking/arms.py',
        '- before - (buffers.nbytes - own)',
        '- before',
        'tests/benchmarking/test_benchmark_run.py::test_arm_memory_excludes_shared_buffers',
    ),
    Mutation(
        "the spread of sessions is passed over", "benchmarking/measure.py",
        "if self.sessions > 1:", "if self.sessions > 99:",
        "tests/benchmarking/test_benchmark_measure.py::"
        "test_interval_of_differing_sessions_covers_their_spread",
    ),
    Mutation(
        'a weight takes part in the election of a sign', 'deltas/mixing.py',
        'votes = sum(d if election == "total" else d.sign() for d in deltas)',
        'votes = sum(w * d if election == "total" else d.sign() for w, d in zip(weights, deltas, strict=True))',
        'tests/deltas/test_deltas.py::test_mixing_sums_and_votes_match_hand_computation',
    ),
    Mutation(
        'the mean of what agrees is a sum', 'deltas/mixing.py',
        'return total / count.clamp(min=1.0)',
        'return total',
        'tests/deltas/test_deltas.py::test_mixing_sums_and_votes_match_hand_computation',
    ),
    Mutation(
        'what DARE keeps is not made larger', 'merging/planning/combine.py',
        'delta / density, 0.0)',
        'delta, 0.0)',
        'tests/merging/test_combining.py::test_combine_dare_keeps_share_and_expected_sum',
    ),
    Mutation(
        'a block draws as if it were the first', 'deltas/draws.py',
        'counter=start // _PER_COUNT',
        'counter=0',
        'tests/merging/test_combining.py::test_dare_draws_do_not_depend_on_blocks',
    ),
    Mutation(
        'one element too few is kept', 'deltas/largest.py',
        '(from_top < kept).sum()',
        '(from_top <= kept).sum()',
        'tests/deltas/test_deltas.py::test_largest_matches_numpy',
    ),
    Mutation(
        'A has no sign', 'merging/planning/combine.py',
        'signed = [copysign(root, s) for root, s in zip(roots, scales, strict=True)]',
        'signed = list(roots)',
        'tests/merging/test_combining.py::test_combine_factors_matches_peft',
    ),
    Mutation(
        'interference forgets the weights', 'merging/running/interference.py',
        'if plan.options.combine != "none" else 1.0',
        'if plan.options.combine == "x" else 1.0',
        'tests/merging/test_combining.py::test_interference_includes_adapter_weights',
    ),
    Mutation(
        'truncation forgets the scaling', 'adapter_tools/truncate.py',
        'spectrum.of_factors(low.scaling * low.left, low.right)',
        'spectrum.of_factors(low.left, low.right)',
        'tests/adapter_tools/test_deriving.py::test_truncate_drops_smallest_singular_values',
    ),
    Mutation(
        'a magnitude stays behind', 'adapter_tools/truncate.py',
        'if update.kind == "dora":\n        new.whole[',
        'if update.kind == "never":\n        new.whole[',
        'tests/adapter_tools/test_deriving.py::test_truncate_keeps_tensors_without_rank[dora]',
    ),
    Mutation(
        'the smallest singular values are kept', 'deltas/spectrum.py',
        'order = sizes.argsort(descending=True)',
        'order = sizes.argsort()',
        'tests/deltas/test_deltas.py::test_spectrum_of_matrix_matches_numpy',
    ),
    Mutation(
        'a changed norm is left out of an extract', 'adapter_tools/extract.py',
        'if self.rest == "drop":',
        'if self.rest != "refuse":',
        'tests/adapter_tools/test_deriving.py::test_extract_at_full_rank_restores_model',
    ),
    Mutation(
        'the effective rank counts squares', 'deltas/spectrum.py',
        'shares = self.sizes / total',
        'shares = self.sizes.square() / self.sizes.square().sum()',
        'tests/adapters/test_understanding.py::test_understand_with_base_matches_numpy',
    ),
    Mutation(
        'a dead module is no trouble', 'adapter_tools/advice.py',
        'elif dead:',
        'elif len(dead) > 99:',
        'tests/adapters/test_understanding.py::test_understand_warns_of_trouble[dead]',
    ),
    Mutation(
        'another base goes unnoticed', 'workflows/switching.py',
        'if hashes.get(record.name) not in (None, record.hash_in):',
        'if hashes.get(record.name) is None:',
        'tests/merging/test_switching.py::test_switch_with_other_base_is_refused',
    ),
    Mutation(
        "an adapter's own text is read by another", 'validation/effect/retention.py',
        'effect.of(alone), effect.without_adapter(alone), effect.of(model))',
        'effect.of(alone), effect.without_adapter(alone), effect.of(alone))',
        'tests/validation/test_combined.py::test_validate_own_texts_measure_each_adapter',
    ),
    Mutation(
        'a data file is larger than it may be', 'packages/graphs.py',
        'if at and at + length > largest:',
        'if at and at + length > 2 * largest:',
        'tests/packages/test_graphs.py::test_data_files_are_split_into_chunks[40000]',
    ),
    Mutation(
        'the two steps of a decoder are exchanged', 'packages/two_steps.py',
        '{"else_branch": branches[1], "then_branch": branches[0]}',
        '{"else_branch": branches[0], "then_branch": branches[1]}',
        'tests/packages/test_graphs.py::test_joined_decoder_equals_both_steps[bart-optimum]',
    ),
    Mutation(
        'a placeholder is taken for a cache', 'packages/speech.py',
        '_node("Mul", [cached.outputs[0], everything], "cache_end")',
        '_node("Identity", [everything], "cache_end")',
        'tests/packages/test_graphs.py::test_joined_decoder_equals_both_steps[whisper-optimum]',
    ),
    Mutation(
        'the legacy theta is left out', 'packages/companions.py',
        'legacy = {theta: rope["rope_theta"]} if "rope_theta" in rope else {}',
        'legacy: dict[str, Any] = {}',
        'tests/packages/test_commands.py::test_package_config_has_legacy_rotary_spelling',
    ),
    Mutation(
        'a file that was added goes unnoticed', 'manifest.py',
        'notes += [f"{n} was added" for n in actual if n not in wanted]',
        'pass',
        'tests/packages/test_tampering.py::test_verify_package_missing_extra_or_moved_file_is_found[decoder_run-hf]',
    ),
    Mutation(
        'a link is followed', 'packages/contents.py',
        'if path.is_symlink() or not (path.is_dir() or path.is_file()):',
        'if not (path.is_dir() or path.is_file()):',
        'tests/packages/test_tampering.py::test_verify_package_link_is_refused',
    ),
    Mutation(
        'an archive tells when its files were written', 'packages/archive.py',
        'entry.size, entry.mode = path.stat().st_size, _MODE',
        'entry.size, entry.mode, entry.mtime = path.stat().st_size, _MODE, path.stat().st_mtime',
        'tests/packages/test_packages.py::test_package_archive_is_reproducible_and_complete[tar.zst]',
    ),
    Mutation(
        'another answer is an answer', 'workflows/delivered.py',
        'if facts.precision in _EXACT:',
        'if facts.precision in ():',
        'tests/packages/test_packages.py::test_verify_run_other_answer_fails',
    ),
    Mutation(
        'what was tampered with is run', 'workflows/delivered.py',
        'elif all(c.passed for c in checks):  # nothing that was tampered with is run',
        'else:',
        'tests/packages/test_tampering.py::test_verify_run_graph_reading_elsewhere_is_not_run',
    ),
    Mutation(
        'a missing signature is one', 'packages/signature.py',
        'return Finding("signature", False, f"a public key was given, but {SIGNATURE} is missing")',
        'return Finding("signature", True, f"a public key was given, but {SIGNATURE} is missing")',
        'tests/packages/test_tampering.py::test_verify_package_forged_manifest_fails_signature',
    ),
    Mutation(
        'genai forgets the search defaults', 'packages/targets/genai.py',
        '"search": {**config["search"], **search}',
        '"search": {**search, **config["search"]}',
        'tests/packages/test_commands.py::test_package_search_defaults_accept_eos_list',
    ),
    Mutation(
        'a name is markup in a README', 'packages/readme.py',
        'names = [markdown(a.name) for a in run.manifest.adapters]',
        'names = [a.name for a in run.manifest.adapters]',
        'tests/packages/test_commands.py::test_package_unusual_names_stay_text[<script>alert(1)</script>]',
    ),
    Mutation(
        'the warm-up masks everything', 'packages/triton/config.py',
        'files[name] = np.ones(dims, value.dtype.numpy())',
        'files[name] = np.zeros(dims, value.dtype.numpy())',
        'tests/packages/test_packages.py::test_package_triton_warm_up_runs[decoder_run]',
    ),
    Mutation(
        'a bill of materials is another each time', 'packages/bom.py',
        'uuid.uuid5(_SPACE, json.dumps(as_json(hashes), sort_keys=True))',
        'uuid.uuid4()',
        'tests/packages/test_packages.py::test_package_is_reproducible[encoder-hf]',
    ),
    Mutation(
        'a changed run is packaged', 'workflows/packaging.py',
        'if wrong is not None:',
        'if wrong is not None and wrong.name == "manifest":',
        'tests/packages/test_commands.py::test_package_failed_or_changed_run_is_refused',
    ),
    Mutation(
        'a notice stays behind', 'packages/companions.py',
        '"licence", "license", "notice",',
        '"licence", "license",',
        'tests/packages/test_packages.py::test_package_has_licences_and_chat_template',
    ),
    Mutation(
        'a file gives way to no variable', 'commands/configuration.py',
        '    return [f"{PREFIX}_{command.upper().replace(\'-\', \'_\')}_{name}", f"{PREFIX}_{name}"]',
        '    return [f"{PREFIX}_{name}", f"{PREFIX}_{command.upper().replace(\'-\', \'_\')}_{name}"]',
        'tests/commands/test_configuration.py::test_configuration_flag_beats_variable_beats_file',
    ),
    Mutation(
        'a variable replaces an output', 'commands/derive.py',
        'type=FOLDER, metavar="OUT", configurable="command line",',
        'type=FOLDER, metavar="OUT",',
        'tests/commands/test_configuration.py::test_configuration_variables_cannot_set_outputs_or_programs',
    ),
    Mutation(
        "a default of one's own is a wish beside --graph-from", 'commands/derive.py',
        '    return source in (sources or (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT))',
        '    return source is not ParameterSource.DEFAULT',
        'tests/commands/test_configuration.py::test_configuration_does_not_change_graph_from_options',
    ),
    Mutation(
        'a damaged configuration goes unseen', 'commands/talk.py',
        '    if isinstance(context.obj, LoraExportError):\n        raise context.obj\n',
        '',
        'tests/commands/test_configuration.py::test_configuration_bad_file_is_refused[device = -no TOML]',
    ),
    Mutation(
        'the command line forgets an option', 'commands/derive.py',
        '        if _name(flag) in given:',
        '        if _name(flag) in given and each.name != "size":',
        'tests/commands/test_derive.py::test_derive_field_is_option_of_command',
    ),
    Mutation(
        'validate takes an option that contradicts the certificate', 'workflows/validating.py',
        'differing = [n for n in differing if n in options.stated]',
        'differing = []',
        'tests/validation/test_merged_with.py::test_merged_with_contradicting_option_is_refused',
    ),
    Mutation(
        'the API forgets the weights', 'checkpoint/sources.py',
        'AdapterChoice(source.folder, float(weight), source',
        'AdapterChoice(source.folder, 1.0, source',
        'tests/test_api.py::test_api_merge_reports_progress_and_prints_nothing',
    ),
    Mutation(
        'rounding errors belong to the base alone', 'validation/comparing/noise.py',
        'rounding_errors(known.adapted(name, weight), dtype, generator)',
        'rounding_errors(weight, dtype, generator)',
        f'{NOISE}::test_rounding_noise_is_as_large_as_the_rounding_of_adapted_weights',
    ),
    Mutation(
        'a figure that is no number is dropped', 'validation/comparing/logits.py',
        'return math.nan if any(math.isnan(v) for v in known) else max(known, default=0.0)',
        'return max(known, default=0.0)',
        f'{NOISE}::test_largest_keeps_nan',
    ),
    Mutation(
        'a threshold that everything satisfies passes', 'validation/comparing/thresholds.py',
        'value >= least > 0, note)',
        'value >= least, note)',
        f'{NOISE}::test_thresholds_that_everything_satisfies_fail',
    ),
    Mutation(
        'numbers that are far from their weights pass', 'validation/graphs/model.py',
        'if not error <= 1:',
        'if not error <= 9:',
        f'{NOISE}::test_validate_int4_scales_of_one_tensor_changed_fails',
    ),
    Mutation(
        'a wrong zero point of a gptq block passes', 'validation/graphs/calibrated.py',
        'worst = [rows, factors, *_shifts(blamed, own + noise, step, how, moment)]',
        'worst = [rows, factors]',
        'tests/validation/test_calibrated_weights.py'
        '::test_judged_gptq_weights_with_fault_fail[own-one zero point off by one]',
    ),
    Mutation(
        'stated errors of quantized weights are taken on trust', 'validation/graphs/stated.py',
        'TOLERANCE = 1e-4', 'TOLERANCE = 1e-1',
        'tests/validation/test_calibrated_weights.py::test_stated_errors_of_one_changed_scale_fail',
    ),
    Mutation(
        'the limit on the KL divergence grows with what is lost', 'validation/effect/precisions.py',
        'max(far.effect, OF_BASE * far.of_base, LEAST_KL)',
        'max(far.effect, OF_BASE * far.lost, LEAST_KL)',
        'tests/validation/test_advice.py::test_adapter_survival_kl_limit_is_the_largest_of_three[more than any]',
    ),
    Mutation(
        'a graph is compared with itself', 'validation/comparing/comparison.py',
        'apart = self._apart(exact, answers)',
        'apart = self._apart(answers, answers)',
        f'{NOISE}::test_validate_graph_fault_shared_with_base_fails[softcap]',
    ),
    Mutation(
        'every fourth expert is compared', 'validation/comparing/tensors.py',
        '_worst(name, actual, wanted, allowed).worst',
        '_worst(name, actual[::4], wanted[::4], allowed[::4]).worst',
        'tests/validation/test_recomputed.py::test_compare_tensors_any_expert_changed_is_named[exchanged]',
    ),
    Mutation(
        'a high rank is too dear', 'validation/reference/whole.py',
        '    return isinstance(module, LoraLayer)',
        '    return False',
        'tests/validation/test_recomputed.py::test_compare_tensors_a_high_rank_is_recomputed_whole',
    ),
    Mutation(
        'buffers are not compared', 'validation/comparing/tensors.py',
        'in plain_buffers(model, wrapped):',
        'in ():',
        'tests/validation/test_recomputed.py::test_compare_tensors_a_running_variance_is_named',
    ),
    Mutation(
        'the merged folder chooses its inputs', 'validation/stages.py',
        'inputs = task.settings, models.dtypes,',
        'inputs = task.merged, models.dtypes,',
        'tests/validation/test_settings.py::test_validate_the_merged_folder_does_not_choose_its_inputs',
    ),
    Mutation(
        'a file too many is no setting', 'validation/folder/settings.py',
        'elif name.endswith(_READ):',
        'elif False:',
        'tests/validation/test_settings.py::'
        'test_settings_check_a_changed_file_is_named_with_its_key[planted_adapter]',
    ),
    Mutation(
        'no text reaches beyond a window', 'validation/comparing/lengths.py',
        'at |= {length, length + 1,',
        'at |= {length} or {length + 1,',
        'tests/validation/test_lengths.py::test_choose_windows_and_original_ropes_are_reached_and_passed[window]',
    ),
    Mutation(
        'what a pax header may hold is not bounded', 'packages/archive.py',
        '    if not 0 < size <= LARGEST_EXTENDED:', '    if size <= 0:',
        'tests/failures/test_bombs.py::test_archive_beyond_bounds_is_refused[a pax header of 100 MB]',
    ),
    Mutation(
        'brackets are parsed however many they are', 'storage/documents.py',
        '> _EXPANSION * size + _ALLOWANCE', '> _EXPANSION * size + 2**40',
        'tests/failures/test_bombs.py::test_header_beyond_bounds_is_refused[many empty lists]',
    ),
    Mutation(
        'PEFT matches by itself', 'patterns.py',
        '        module.re = stand_in', '        module.re = re',
        'tests/test_patterns.py::test_peft_pathological_pattern_is_stopped[target_modules]',
    ),
    Mutation(
        'a lock is written through a second name', 'storage/locks.py',
        'if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:',
        'if not stat.S_ISREG(status.st_mode):',
        'tests/failures/test_output_folders.py::test_planted_lock_is_refused_and_not_written[hard link]',
    ),
    Mutation(
        'a planted folder becomes the output', 'storage/scratch.py',
        'return old if os.path.lexists(old) and _identity(old) == identity else None',
        'return old if os.path.lexists(old) else None',
        'tests/failures/test_output_folders.py::test_planted_folder_does_not_become_output[noted]',
    ),
    Mutation(
        'a configuration file sets the tolerance', 'contracts/options.py',
        'minimum=1, metavar="FACTOR",',
        'minimum=1, metavar="FACTOR", configurable="file",',
        'tests/commands/test_configuration.py::test_configuration_option_that_affects_verdict_is_refused[lora-export.toml-tolerance]',
    ),
    Mutation(
        'a runtime may be told of a library', 'allowed/genai_config.py',
        '"enable_cpu_mem_arena": FLAG,',
        '"enable_cpu_mem_arena": FLAG, "custom_ops_library": WORD,',
        'tests/packages/test_attacks.py::test_verify_run_package_with_library_runs_nothing',
    ),
    Mutation(
        'a kernel of a hub is an implementation', 'allowed/hub.py',
        'isinstance(one, str) and one in _IMPLEMENTATIONS',
        'isinstance(one, str)',
        'tests/packages/test_attacks.py::test_commands_reading_model_with_kernel_load_none',
    ),
    Mutation(
        'a package runs with a network', 'workflows/confined.py',
        'if libc.unshare(NET) == 0:',
        'if True:',
        'tests/packages/test_confined.py::test_confined_program_reaches_no_network',
    ),
    Mutation(
        'constants that steer count by type and shape', 'onnx_export/graphs/steering_constants.py',
        'flow.behind(flow.work) |',
        'set() |',
        'tests/onnx_export/test_steering.py::test_steering_branch_on_length_is_other_graph',
    ),
    Mutation(
        'the largest error forgets NaN', 'merging/running/exact.py',
        'largest if math.isnan(largest) else max(errors.largest, largest)',
        'max(errors.largest, largest)',
        'tests/test_not_a_number.py::test_check_of_nan_fails[exact]',
    ),
    Mutation(
        'verify compares no bytes of computed rows', 'merging/certificate/recompute.py',
        '            known.rows[rows] = True',
        '            self.different.pop(info.name)',
        'tests/failures/test_verify.py::test_verify_rows_outside_certificate_are_compared',
    ),
    Mutation(
        'the weights of an export are not made again', 'storage/workers.py',
        '            if len(there) < len(wanted) or not np.array_equal(wanted, there):',
        '            if len(there) < len(wanted):',
        'tests/failures/test_forgeries.py::test_verify_run_with_base_weights_in_graph_fails',
    ),
    Mutation(
        'a graph of another name is no graph', 'onnx_export/graphs/finding.py',
        'p.suffix == SUFFIX or looks_like_graph(p)',
        'p.suffix == SUFFIX',
        'tests/onnx_export/test_finding.py::test_find_graphs_of_another_name_finds_them_by_content[noext-]',
    ),
    Mutation(
        'no batch of an encoder is padded', 'validation/kinds/models.py',
        'if "attention_mask" in takes(model) and pad is not None and len(texts.tokens) > 1:',
        'if "attention_mask" not in takes(model) and pad is not None and len(texts.tokens) > 1:',
        'tests/validation/test_graph_faults.py::'
        'test_validate_graph_fault_shared_with_the_base_fails[padding alone]',
    ),
    Mutation(
        'numbers that no node reads are compared', 'validation/graphs/weights.py',
        'unread = not all(map(source.reads, parts))',
        'unread = False',
        f'{NOISE}::test_validate_numbers_that_the_data_files_do_not_hold_fail[another]',
    ),
    Mutation(
        'RandLoRA pairs ranks and bases as one would expect', 'adapters/randlora.py',
        '(factors[:, :, None] * a * gamma).flatten(0, 1)',
        '(factors[:, :, None] * a * gamma).transpose(0, 1).flatten(0, 1)',
        f'{MATRIX}[randlora on gemma]',
    ),
    Mutation(
        'WaveFT takes quadrants by their names', 'adapters/waveft.py',
        'values[:, None] * bank[high_column], bank[high_row]',
        'values[:, None] * bank[high_row], bank[high_column]',
        'tests/adapters/test_rare_kinds.py::'
        'test_waveft_basis_is_outer_product_of_filters[shape0-db2]',
    ),
    Mutation(
        'RoAd leaves biases as they are', 'adapters/road.py', 'return [weight, bias]', 'return [weight]',
        f'{MATRIX}[road on roberta]',
    ),
    Mutation(
        'normalizations that LN tuning trained are not compared', 'validation/reference/probes.py',
        'elif isinstance(module, LNTuningLayer):', 'elif isinstance(module, type):',
        'tests/validation/test_rare_kinds.py::'
        'test_compare_tensors_of_a_rare_kind_names_the_weight_that_is_wrong[ln tuning]',
    ),
    Mutation(
        "GLoRA's bias lacks W·C", "adapters/glora.py",
        " + self.moved[rows]", "",
        f"{MATRIX}[glora vector on llama]",
    ),
    Mutation(
        "HiRA's part of an embedding has the base layer's factor", "adapters/hira.py",
        "down.T / (layer.scale if layer else 1.0)", "down.T",
        f"{MATRIX}[hira embedding on gemma3]",
    ),
    Mutation(
        "all layers of TinyLoRA draw one projection", "adapters/tinylora.py",
        "groups.settings.projection_seed + groups.numbers[module]", "groups.settings.projection_seed",
        f"{MATRIX}[tinylora regenerated on bert]",
    ),
    Mutation(
        "the class that Uni-LoRA was trained on is forgotten", "merging/running/read_base.py",
        "return name if isinstance(name, str) else None", "return None",
        "tests/adapters/test_rarer_kinds.py::test_unilora_class_decides_its_layers",
    ),
    Mutation(
        'rows that share a byte are read from its other end', 'quantization/packed.py',
        'place if low_first else count - 1 - place',
        'count - 1 - place',
        'tests/quantization/test_samples.py::test_sample_weight_matches_its_library[quanto-qint4]',
    ),
    Mutation(
        'pairs of rows of a GGUF Llama stay pairs', 'quantization/gguf.py',
        'return rows - within + within % (size // 2) * 2 + within // (size // 2)',
        'return rows',
        'tests/quantization/test_gguf.py::test_gguf_matches_transformers_reader[F32]',
    ),
    Mutation(
        'what the second reader finds is not compared', 'validation/reference/second_reader.py',
        '        _refuse_another(copy, expected)',
        '        pass',
        'tests/validation/test_second_reader.py::test_second_reader_difference_fails_validation[packed]',
    ),
    Mutation(
        'the metadata of codes stays on weights', 'merging/planning/plan.py',
        'metadata = {} if dequantized else dict(given.metadata)',
        'metadata = dict(given.metadata)',
        'tests/quantization/test_samples.py::test_sample_base_merge_equals_unmerged[torchao-int8-True]',
    ),
    Mutation(
        'quantized numbers leave without their meaning', 'merging/planning/leftovers.py',
        '    if suspects:',
        '    if not suspects:',
        'tests/merging/test_leftovers.py::test_leftover_gpt_oss_without_settings_is_refused',
    ),
    Mutation(
        'the sign of MXFP4 is taken from another number', 'quantization/mxfp4.py',
        'each.bitwise_right_shift_(3)',
        'moved.bitwise_right_shift_(3)',
        'tests/quantization/test_floating.py::test_mxfp4_matches_transformers[118-126]',
    ),
    Mutation(
        'the scale of an NVFP4 tensor divides where it multiplies', 'quantization/fp4.py',
        'scale / whole if self.divided else scale * whole',
        'scale * whole if self.divided else scale / whole',
        'tests/quantization/test_floating.py::test_modelopt_nvfp4_matches_definition',
    ),
    Mutation(
        'a part of the configuration keeps its quantization', 'quantization/settings.py',
        'yield from _parts(value, f"{place}{key}.")',
        'yield from _parts(value, place)',
        'tests/quantization/test_floating.py::test_quantization_settings_of_config_part_are_removed',
    ),
    Mutation(
        'adapters of an older transformers find no weight', 'merging/planning/targets.py',
        'update = replace(given, target=today[given.target]) if given.target in today else given',
        'update = given',
        'tests/validation/test_generations.py::test_merge_names_of_any_generation_gives_same_model[vit-4-5-True]',
    ),
    Mutation(
        "patterns of an older adapter are read by today's names", 'validation/reference/renamed.py',
        'key = get_pattern_key(list(pattern), old)',
        'key = get_pattern_key(list(pattern), modules[old])',
        'tests/validation/test_generations.py::test_validate_ranks_of_older_names_are_read_by_the_older_names',
    ),
    Mutation(
        'PEFT changes names that were right', 'validation/reference/unmerged.py',
        'with contextlib.nullcontext() if scratch is None else names_as_they_are():',
        'with contextlib.nullcontext():',
        'tests/validation/test_generations.py::test_validate_names_that_peft_itself_changes_on_loading',
    ),
    Mutation(
        'an update that is zero is an unused one', 'validation/comparing/deviation.py',
        'return not torch.equal(wrapper(inputs), base_layer(wrapper)(inputs))',
        'return inputs is not None',
        'tests/validation/test_unused.py::test_validate_an_update_of_zero_or_another_fault_names_none',
    ),
    Mutation(
        "a tied head keeps the base's embedding under mlx-lm", "adapters/mlx.py",
        "config=config, tied=True)", "config=config)",
        "tests/adapters/test_mlx.py::test_merge_mlx_equals_mlx_forward[tied]",
    ),
    Mutation(
        "out_proj of an nn.MultiheadAttention is updated once", "adapters/attention.py",
        '"out_proj.weight": 2}', '"out_proj.weight": 1}',
        "tests/adapters/test_attention.py::test_merge_attention_equals_unmerged_forward[settings0]",
    ),
    Mutation(
        "q, k, v and z of each head are taken for blocks", "merging/planning/weight_parts.py",
        "by_head = whole in _BY_HEAD", "by_head = False",
        "tests/adapters/test_split_projections.py::test_split_projection_merge_equals_separate_parts[qwen3-next]",
    ),
    Mutation(
        "a value head stays behind", "checkpoint/trained_beside.py",
        "files = [folder / VALUE_HEAD]", "files = []",
        "tests/merging/test_beside_the_adapter.py::test_merge_copies_value_head_and_reports_it",
    ),
    Mutation(
        "a weight that neither base nor adapter has is no reason to refuse", "merging/architecture/model.py",
        "if name not in filled\n", "if name in filled and name not in filled\n",
        "tests/merging/test_heads.py::test_head_merge_with_random_weights_is_refused",
    ),
    Mutation(
        "the head of another size need not fit", "merging/planning/head_class.py",
        "elif update.target in heads and not update.fits(known.shapes[name]):", "elif False:",
        "tests/merging/test_heads.py::test_head_merge_has_trained_class[vit with other labels]",
    ),
    Mutation(
        "the base of a comparison keeps the head that was drawn", "validation/reference/unmerged.py",
        "if name in heads:", "if name in heads and name not in heads:",
        "tests/validation/test_new_heads.py::test_reference_without_its_adapter_has_the_head",
    ),
    Mutation(
        "validate takes any body under a new head", "validation/folder/stored.py",
        "before = {new: before[old] for new, old in trained.renamed(before, after).items()}",
        "before, after = {}, {}",
        "tests/validation/test_new_heads.py::test_validate_spoiled_merge_fails[kept_head-stored_tensors_differ]",
    ),
    Mutation(
        'blocks that shared a weight with the embedding flag are left out', 'merging/planning/settle.py',
        'layout.added[name] = source',
        'pass',
        "tests/merging/test_ties.py::test_tied_merge_equals_unmerged_model"
        "[zamba: modules_to_save=['HEAD'], None rows, auto]",
    ),
    Mutation(
        'a head keeps the bias that PEFT leaves out', 'merging/planning/settle.py',
        'layout.targets[name] = [vocabulary.no_bias(name)]',
        'pass',
        "tests/merging/test_ties.py::test_tied_merge_equals_unmerged_model"
        "[bert: trainable_token_indices={'EMBEDDING': [11, 60]}, None rows, auto]",
    ),
    Mutation(
        'a row that nobody trained is made up', 'merging/planning/vocabulary.py',
        'if unknown:',
        'if False:',
        'tests/merging/test_vocabulary.py::test_resized_gap_row_is_refused',
    ),
    Mutation(
        "each of several joined tensors begins the loaded one", "merging/architecture/pieces.py",
        "places = self.convert(numbered)[loaded] - mine", "places = self.convert(numbered)[loaded]",
        "tests/merging/test_converted.py::"
        "test_converted_joined_tensors_get_their_rows",
    ),
    Mutation(
        "the token before the last is pooled", "onnx_export/engines/parts/sentence.py",
        "(_positions(mask).amax(1) - 1).clamp(min=0)", "(_positions(mask).amax(1) - 2).clamp(min=0)",
        "tests/onnx_export/test_sentence.py::test_pooling_leaves_out_padding",
    ),
    Mutation(
        "a text of a validation is not looked up among those of calibrations", "workflows/held_out.py",
        "found = calibrated.get(_hashed(file)) if file is not None else None", "found = None",
        "tests/validation/test_held_out.py::test_calibrated_text_as_judge_is_refused[--own-text]",
    ),
    Mutation(
        "the ends that the base knows are forgotten", "merging/planning/ends.py",
        '"eos_token_id": [number, *known]}', '"eos_token_id": [number]}',
        "tests/merging/test_ends.py::test_merge_follows_end_of_adapters_tokenizer",
    ),
    Mutation(
        "moments of several uses are sums, not means", "onnx_export/quantize/moments.py",
        "matrix /= np.float32(max(1, self.tokens))", "matrix /= np.float32(1)",
        "tests/onnx_export/test_statistics.py::test_collect_layer_that_runs_twice_has_the_mean_of_both",
    ),
    Mutation(
        "a long text is calibrated on its beginning", "onnx_export/quantize/calibration.py",
        "pieces = [pieces[i] for i in _even(len(pieces), count)]", "pieces = pieces[:count]",
        "tests/onnx_export/test_statistics.py::test_windows_are_whole_and_taken_at_even_distances",
    ),
    Mutation(
        "alpha of a module in a style file is forgotten", "adapters/diffusion/kinds/module.py",
        "(self.module.alpha / rank if self.module.alpha else 1.0)", "1.0",
        "tests/diffusion/test_kinds.py::test_scale_is_alpha_by_rank_and_one_without_alpha",
    ),
    Mutation(
        "swapped halves of a fused weight stay where they were", "adapters/diffusion/pieces.py",
        "return Place(target, (Run(0, start + half, half), Run(half, start, half)))",
        "return Place(target, (Run(0, start, half), Run(half, start + half, half)))",
        "tests/diffusion/test_formats.py::test_merge_of_a_format_is_exact[flux kohya-fp32]",
    ),
    Mutation(
        "every part of a fused weight gets the first rows", "adapters/diffusion/pieces.py",
        "return Place(target, (Run(0, start, stop - start),))", "return Place(target, (Run(0, 0, stop - start),))",
        "tests/diffusion/test_formats.py::test_merge_of_a_format_is_exact[sd3 kohya-bf16]",
    ),
    Mutation(
        "float64 goes to 16 bits by way of fp32", "merging/running/rounding.py",
        "if values.dtype != torch.float64 or dtype not in (torch.float16, torch.bfloat16):", "if True:",
        "tests/merging/test_rounding.py",
    ),
    Mutation(
        "copied components of a pipeline are not compared with the base's", "merging/pipelines/verifying.py",
        "!= recorded.files[n].blake3", "is None",
        "tests/diffusion/test_pipeline_merge.py::test_pipeline_verify_finds_another_base_and_another_adapter",
    ),
    Mutation(
        "a record is taken whatever its digest", "records.py",
        "if seal is None or hashlib.sha256(raw[: seal.start()] + _END).hexdigest().encode() != seal[1]:",
        "if seal is None:",
        "tests/fleet/test_stores.py::test_record_with_any_byte_changed_is_refused",
    ),
    Mutation(
        "a row that died is tried again where it died", "fleet/driver.py",
        "            item.avoid = index\n            group.items.append(item)",
        "            group.items.append(item)",
        "tests/fleet/test_driver.py::test_drive_died_row_is_tried_again_on_another_slot",
    ),
    Mutation(
        "a row is admitted whatever it takes", "fleet/scratch.py",
        "self.used(but=slot) + nbytes > self.limit",
        "self.used(but=slot) > self.limit",
        "tests/fleet/test_driver.py::test_drive_rows_together_stay_within_the_disk",
    ),
    Mutation(
        "an input that changed since the plan is worked on", "workflows/fleet/row.py",
        "if key_of(inputs) != wanted:",
        "if not wanted:",
        "tests/fleet/test_rows.py::test_row_whose_input_changed_since_the_plan_keeps_nothing",
    ),
    Mutation(
        "a finished fleet tells of each run anew", "report/fleet_document.py",
        "and fleet_rows.same(report.rows, before.rows)",
        "and report.rows == before.rows",
        "tests/fleet/test_fleet_report.py::test_rerun_of_finished_fleet_writes_nothing",
    ),
    Mutation(
        "a figure that is no number any more has not moved", "report/fleet_rows.py",
        "return math.isnan(before) != math.isnan(after)",
        "return False",
        "tests/fleet/test_fleet_report.py::test_survival_has_moved_beyond_half_a_point",
    ),
    Mutation(
        "a link in a fleet's page may lead out of the root", "report/fleet_page.py",
        'any(part in ("", ".", "..") for part in parts)',
        'any(part == "." for part in parts)',
        "tests/fleet/test_fleet_pages.py::test_page_links_stay_in_the_root",
    ),
    Mutation(
        "an object that is gone still counts", "workflows/fleet/joined.py",
        "if record is None and row.place:",
        "if record is None and not row.key:",
        "tests/fleet/test_fleet_joined.py::test_report_tells_of_objects_that_are_gone_or_damaged",
    ),
    Mutation(
        "the weight of an adapter is no part of its key", "keys/inputs.py",
        '"weight": float(weight)', '"weight": 1.0',
        "tests/keys/test_keys.py::test_key_each_change_of_an_input_is_another_key",
    ),
    Mutation(
        "a base in a jobs file beats its rows", "fleet/jobs.py",
        "(*self.defaults, *own, *layers)", "(*self.defaults, *layers, *own)",
        "tests/fleet/test_jobs.py::test_jobs_row_beats_group_beats_base_beats_all",
    ),
    Mutation(
        "a claim of a living driver does not count", "fleet/claims.py",
        "return _started(lease.pid) == lease.started", "return _started(lease.pid) != lease.started",
        "tests/fleet/test_two_drivers.py::test_claims_one_holder_at_a_time",
    ),
)  # fmt: skip
