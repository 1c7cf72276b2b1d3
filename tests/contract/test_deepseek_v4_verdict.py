"""The verdict for DeepSeek-V4 on every release, and on changes to 0.20.0 that upstream has not made."""

from __future__ import annotations

import ast
import pathlib

import pytest

from overlay.patches.deepseek_v4.verdict import INDEXER, MODULES, WRAPPER
from overlay.patches.registry import judge
from overlay.verdict import Source, SourceTree, Verdict

from .released import EXPECTED, ChangedTree, tree

pytestmark = pytest.mark.contract

OLD, NEW = "model_executor/layers/deepseek_v4_attention.py", "models/deepseek_v4/attention.py"
#: Read from the sources by hand: the first patched method, or the call by which upstream runs the GEMMs in parallel.
WHERE = {
    "0.20.0": f"{OLD}:274",
    "0.20.1": f"{OLD}:380",
    "0.20.2": f"{OLD}:380",
    "0.21.0": f"{OLD}:404",
    "0.22.0": f"{NEW}:397",
    "0.22.1": f"{NEW}:397",
    "0.23.0": f"{NEW}:414",
    "0.24.0": f"{NEW}:416",
    "0.25.1": f"{NEW}:420",
    "0.26.0": f"{NEW}:420",
    "0.27.1": f"{NEW}:449",
    "0.28.0": f"{NEW}:565",
    "0.29.0": f"{NEW}:597",
    "0.30.0": f"{NEW}:706",
    "0.31.0": f"{NEW}:721",
    "0.32.0": f"{NEW}:721",
    "0.33.0": f"{NEW}:725",
}
MODULE_OF = {
    "attention": "vllm.model_executor.layers.deepseek_v4_attention",
    "compressor": "vllm.model_executor.layers.deepseek_compressor",
    "streams": "vllm.utils.multi_stream_utils",
}


@pytest.mark.parametrize("version", EXPECTED)
def test_verdict(version: str) -> None:
    found = judge("deepseek_v4", tree(version))
    if version not in WHERE:
        assert (found.state, found.module, found.where) == ("absent", None, None)
        return
    assert found.where is not None and found.where.endswith(f"/vllm/{WHERE[version]}")
    assert found.module in MODULES and found.module.replace(".", "/") in found.where
    if version == "0.20.0":
        assert (found.state, found.class_name, found.methods) == ("apply", WRAPPER, ("forward", "attention_impl"))
        assert found.upstream is None
    else:
        assert (found.state, found.methods) == ("landed", ())
        assert found.upstream is not None and found.upstream.on_by_default
        assert found.upstream.pull_request == "#41061"


@pytest.mark.parametrize("version", sorted(set(WHERE) - {"0.20.0"}))
def test_upstreams_own_switch_is_on_and_where_the_verdict_says(version: str) -> None:
    found = judge("deepseek_v4", tree(version))
    assert found.where is not None and found.upstream is not None
    path, _, line = found.where.rpartition(":")
    assert "= execute_in_parallel(" in pathlib.Path(path).read_text("utf-8").splitlines()[int(line) - 1]
    name = found.upstream.setting.split()[0]
    environment = tree(version).read("vllm.envs")
    assert environment is not None
    assert f"    {name}: int = 1024\n" in environment.text


# ---------------------------------------------------------------------------------------------- mutations

Change = tuple[str, str, str]  #: which module, a piece of its text that is there once, and what takes its place

INPUT = "self.fused_wqa_wkv(hidden_states)"
SPLIT = "qr_kv.split([self.q_lora_rank, self.head_dim], dim=-1)"
GEMM_CALL = "cublas_gemm_bf16_bf16_fp32(x, self.fused_wkv_wgate.weight)"
WEIGHTS = "weights, _ = self.weights_proj(hidden_states)"
CONTEXT = "        forward_context = get_forward_context()\n        attn_metadata = forward_context.attn_metadata\n\n        qr, kv ="
METADATA = "        attn_metadata = get_forward_context().attn_metadata\n"
FIRST = "        qr_kv, _ ="


def before(anchor: str, line: str) -> tuple[str, str]:
    return anchor, f"        {line}\n{anchor}"


DRIFTING: dict[str, Change] = {
    # the traced forward
    "another input": ("attention", INPUT, "self.fused_wqa_wkv(hidden_states * 1)"),
    "another GEMM": ("attention", INPUT, "self.fused_wqkv_a(hidden_states)"),
    "two GEMMs": ("attention", FIRST, f"        self.fused_wqa_wkv(hidden_states)\n{FIRST}"),
    "GEMM under a condition": ("attention", FIRST, f"        if self.eps:\n    {FIRST}"),
    "GEMM in an expression": ("attention", INPUT, f"self.scaled({INPUT})"),
    "GEMM with a bias": ("attention", INPUT, "self.fused_wqa_wkv(hidden_states, bias=None)"),
    "result split otherwise": ("attention", SPLIT, "qr_kv.split([self.q_lora_rank, self.kv_lora_rank], dim=-1)"),
    "result normed before the split": ("attention", SPLIT, f"self.q_norm(qr_kv){SPLIT[5:]}"),
    "result used twice": ("attention", "        # Pre-allocate attention output", "        rows = qr_kv.shape[0]\n        #"),
    "qr used in the trace": ("attention", "        # Pre-allocate attention output", "        rows = qr.shape[0]\n        #"),
    "kv bound again": ("attention", "        # Pre-allocate attention output", "        kv = kv\n        #"),
    "input changed in between": (
        "attention",
        "        # Pre-allocate attention output",
        "        hidden_states.mul_(2)\n        #",
    ),
    "input replaced": ("attention", FIRST, f"        hidden_states = hidden_states.clone()\n{FIRST}"),
    "self handed out": ("attention", FIRST, f"        register(self)\n{FIRST}"),
    "self stored to": ("attention", FIRST, f"        self.calls = 1\n{FIRST}"),
    "super in the forward": ("attention", FIRST, f"        super().train()\n{FIRST}"),
    "forward decorated": ("attention", "    def forward(\n        self,\n        positions: torch.Tensor,\n        hidden_states", "    @torch.no_grad()\n    def forward(\n        self,\n        positions: torch.Tensor,\n        hidden_states"),
    "op renamed": ("attention", "torch.ops.vllm.deepseek_v4_attention(", "torch.ops.vllm.deepseek_v4_mla("),
    "op given qr and kv exchanged": ("attention", "            qr,\n            kv,\n            positions,\n            o_padded", "            kv,\n            qr,\n            positions,\n            o_padded"),
    "class changed afterwards": ("attention", "\n\ndef deepseek_v4_attention(", f"\n\n{WRAPPER}.forward = None\n\ndef deepseek_v4_attention("),
    "class defined again": ("attention", "\n\ndef deepseek_v4_attention(", f"\n\n{WRAPPER} = object\n\ndef deepseek_v4_attention("),
    "class renamed": ("attention", f"class {WRAPPER}(", "class DeepseekV4Wrapper("),
    # the op
    "op without qr": ("attention", "    self.attention_impl(hidden_states, qr, kv, positions, out)", "    self.attention_impl(hidden_states, positions, out)"),
    "op with a scaled input": ("attention", "self.attention_impl(hidden_states, qr,", "self.attention_impl(2 * hidden_states, qr,"),
    "op calls twice": ("attention", "    self.attention_impl(hidden_states", "    self.attention_impl(hidden_states, qr, kv, positions, out)\n    self.attention_impl(hidden_states"),
    # attention_impl
    "a parameter more": ("attention", "        kv: torch.Tensor,\n        positions: torch.Tensor,\n        out: torch.Tensor,  #", "        kv: torch.Tensor,\n        scale: float,\n        positions: torch.Tensor,\n        out: torch.Tensor,  #"),
    "returns early": ("attention", CONTEXT, f"        if hidden_states.shape[0] > 9:\n            return\n{CONTEXT}"),
    "input changed before it is used": ("attention", CONTEXT, f"        hidden_states.mul_(2)\n{CONTEXT}"),
    "input replaced in attention_impl": ("attention", CONTEXT, f"        hidden_states = qr\n{CONTEXT}"),
    "compressor given something else": ("attention", "                compressor(hidden_states, positions, self.rotary_emb)", "                compressor(qr, positions, self.rotary_emb)"),
    "compressor under a condition": ("attention", "                compressor(hidden_states, positions, self.rotary_emb)", "                if attn_metadata:\n                    compressor(hidden_states, positions, self.rotary_emb)"),
    "compressor called twice": ("attention", "                compressor(hidden_states, positions, self.rotary_emb)", "                compressor(hidden_states, positions, self.rotary_emb)\n                compressor(hidden_states, positions, self.rotary_emb)"),
    "compressor not called beside the indexer": ("attention", "                compressor(hidden_states, positions, self.rotary_emb)\n", ""),
    "compressor after a return": ("attention", "                compressor(hidden_states, positions, self.rotary_emb)", "                return\n                compressor(hidden_states, positions, self.rotary_emb)"),
    "compressor alone given something else": ("attention", "lambda: compressor(hidden_states,", "lambda: compressor(qr,"),
    "indexer given something else": ("attention", "lambda: indexer(hidden_states, qr,", "lambda: indexer(out, qr,"),
    "compressor's name bound again": ("attention", "            compressor = self.compressor\n\n            def", "            compressor = self.compressor\n            compressor = qr.append\n\n            def"),
    "indexer called elsewhere": ("attention", CONTEXT, f"        self.indexer(hidden_states)\n{CONTEXT}"),
    "indexer under another condition": ("attention", "        if self.indexer is not None:", "        if self.indexer:"),
    "another helper for two streams": ("attention", "            maybe_execute_in_parallel(\n                lambda: indexer", "            in_parallel(\n                lambda: indexer"),
    # the indexer
    "weights given something else": ("attention", WEIGHTS, "weights, _ = self.weights_proj(qr)"),
    "weights for some tokens": ("attention", WEIGHTS, "weights, _ = self.weights_proj(hidden_states[:1])"),
    "weights twice": ("attention", WEIGHTS, f"{WEIGHTS}\n        {WEIGHTS}"),
    "weights under a condition": ("attention", f"        {WEIGHTS}", f"        if self.use_fp4_kv:\n            {WEIGHTS}"),
    "indexer changes its input": ("attention", f"        {WEIGHTS}", f"        hidden_states += 1\n        {WEIGHTS}"),
    "indexer uses its input before": ("attention", f"        {WEIGHTS}", f"        self.look(hidden_states)\n        {WEIGHTS}"),
    "indexer without a compressor": ("attention", "k = self.compressor(hidden_states, positions, rotary_emb)", "k = None"),
    "indexer class gone": ("attention", f"class {INDEXER}(", "class DeepseekV4LightIndexer("),
    # the compressor
    "kv_score by another function": ("compressor", GEMM_CALL, "torch.mm(x, self.fused_wkv_wgate.weight.t(), out_dtype=torch.float32)"),
    "kv_score of another input": ("compressor", GEMM_CALL, "cublas_gemm_bf16_bf16_fp32(x * 2, self.fused_wkv_wgate.weight)"),
    "kv_score of another weight": ("compressor", GEMM_CALL, "cublas_gemm_bf16_bf16_fp32(x, self.weight)"),
    "kv_score twice": ("compressor", f"        kv_score = {GEMM_CALL}", f"        kv_score = {GEMM_CALL}\n        kv_score = {GEMM_CALL}"),
    "kv_score under a condition": ("compressor", f"        kv_score = {GEMM_CALL}", f"        if num_tokens:\n            kv_score = {GEMM_CALL}"),
    "kv_score after an early return": ("compressor", f"        kv_score = {GEMM_CALL}", f"        if not num_tokens:\n            return\n        kv_score = {GEMM_CALL}"),
    "compressor changes its input": ("compressor", f"        kv_score = {GEMM_CALL}", f"        x.mul_(2)\n        kv_score = {GEMM_CALL}"),
    "compressor replaces its input": ("compressor", f"        kv_score = {GEMM_CALL}", f"        x = x.contiguous()\n        kv_score = {GEMM_CALL}"),
    "compressor's input bound to something else": ("compressor", f"        kv_score = {GEMM_CALL}", f"        x = positions\n        kv_score = {GEMM_CALL}"),
    "compressor's input bound again later": ("compressor", f"        kv_score = {GEMM_CALL}", f"        kv_score = {GEMM_CALL}\n        x = positions"),
    "the function under another name": ("compressor", "import cublas_gemm_bf16_bf16_fp32", "import gemm as cublas_gemm_bf16_bf16_fp32"),
    "the function by its module": ("compressor", "import cublas_gemm_bf16_bf16_fp32\n", "import utils\n"),
    "a function of its own": ("compressor", "\n\nclass CompressorBackend(", "\n\ndef cublas_gemm_bf16_bf16_fp32(x, weight):\n    return x\n\n\nclass CompressorBackend("),
    "compressor class gone": ("compressor", "class DeepseekCompressor(", "class DeepseekV4Compressor("),
    # upstream's own second stream
    "the helper does not join": ("streams", "        event1.wait()\n", ""),
    "the helper joins before the record": ("streams", "            event1.record()\n        event1.wait()\n", "            pass\n        event1.wait()\n        event1.record()\n"),
    "the helper records nothing": ("streams", "            event1.record()\n", ""),
    "the helper records before its work": ("streams", "            result1 = fn1()\n            event1.record()\n", "            event1.record()\n            result1 = fn1()\n"),
    "the helper waits for another event": ("streams", "        event1.wait()\n", "        event1 = event0\n        event1.wait()\n"),
    "the helper goes on after its join": ("streams", "        event1.wait()\n", "        event1.wait()\n        result1 = fn1()\n"),
    "the helper returns before its join": ("streams", "        event1.wait()\n", "        if result1 is None:\n            return (result0, result1)\n        event1.wait()\n"),
    "the helper without a stream": ("streams", "    if aux_stream is not None:", "    if aux_stream:"),
    "not Python": ("attention", FIRST, "        qr_kv, _ = ("),
    "the compressor is not Python": ("compressor", "        num_tokens, _ = x.shape", "        num_tokens, _ = ("),
}  # fmt: skip

HARMLESS: dict[str, Change] = {
    "as released": ("attention", FIRST, FIRST),
    "a comment": ("attention", FIRST, f"        # self.fused_wqa_wkv(hidden_states) runs here\n{FIRST}"),
    "a statement that has nothing to do with it": ("attention", FIRST, f"        scale = self.scale * 2\n{FIRST}"),
    "another name for the result": ("attention", f"qr_kv, _ = {INPUT}\n        qr, kv = qr_kv.", f"both, _ = {INPUT}\n        qr, kv = both."),
    "the number of tokens first": ("attention", FIRST, f"        count = hidden_states.shape[0]\n{FIRST}"),
    "an assertion on the device": ("attention", CONTEXT, f"        assert hidden_states.is_cuda\n{CONTEXT}"),
    "another output projection": ("attention", "        return self.wo_b(z.flatten(1))", "        return self.wo_b(z.flatten(1).contiguous())"),
    "another norm": ("attention", "        qr, kv = fused_q_kv_rmsnorm(", "        qr, kv = fused_norm("),
    "another kv insert": ("attention", "    def _fused_qnorm_rope_kv_insert(", "    def _insert_kv(self):\n        return None\n\n    def _fused_qnorm_rope_kv_insert("),
    "more for dummy runs": ("attention", "            out.zero_()\n            return", "            out.zero_()\n            kv.zero_()\n            return"),
    "the indexer's query first": ("attention", f"        {WEIGHTS}", f"        q = q.contiguous()\n        {WEIGHTS}"),
    "the indexer's weights before its compressor": ("attention", f"        k = self.compressor(hidden_states, positions, rotary_emb)\n        {WEIGHTS}", f"        {WEIGHTS}\n        k = self.compressor(hidden_states, positions, rotary_emb)"),
    "the indexer's input used afterwards": ("attention", "        return self.indexer_op(hidden_states,", "        hidden_states.record()\n        return self.indexer_op(hidden_states,"),
    "another attention class": ("attention", "class DeepseekV4IndexerCache(", "class Another:\n    def forward(self):\n        return self.fused_wqa_wkv(1)\n\n\nclass DeepseekV4IndexerCache("),
    "kv_score under another name": ("compressor", f"kv_score = {GEMM_CALL}\n", f"score_kv = {GEMM_CALL}\n        kv_score = score_kv\n"),
    "no number of tokens in the compressor": ("compressor", "        num_tokens, _ = x.shape\n", ""),
    "the compressor's cache otherwise": ("compressor", METADATA, f"        cache = self.state_cache\n{METADATA}"),
    "another class in the compressor's module": ("compressor", "\n\nclass CompressorBackend(", "\n\nclass First:\n    pass\n\n\nclass CompressorBackend("),
    "a third event": ("streams", "        event0.record()\n", "        event0.record()\n        event0.query()\n"),
}  # fmt: skip


def changed(change: Change) -> tuple[Verdict, Source]:
    where, old, new = change
    module = MODULE_OF[where]
    source = tree("0.20.0").read(module)
    assert source is not None
    assert source.text.count(old) == 1, f"{old!r} is there {source.text.count(old)} times"
    source = Source(source.text.replace(old, new), source.path)
    return judge("deepseek_v4", ChangedTree("0.20.0", module, source)), source


@pytest.mark.parametrize("name", DRIFTING)
def test_what_the_patch_could_not_survive_is_drifted(name: str) -> None:
    found, source = changed(DRIFTING[name])
    if "not Python" not in name:
        ast.parse(source.text)  # or it would drift for the wrong reason
    assert found.state == "drifted", found
    assert found.methods == () and found.reason and found.where is not None
    path, _, line = found.where.rpartition(":")
    assert path.endswith(".py") and int(line) > 0


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_nothing_is_applied(name: str) -> None:
    found, source = changed(HARMLESS[name])
    ast.parse(source.text)
    assert (found.state, found.methods) == ("apply", ("forward", "attention_impl")), found


@pytest.mark.parametrize("module", ["compressor", "streams"])
def test_a_module_that_is_gone_is_drifted(module: str) -> None:
    class Without(SourceTree):
        def read(self, name: str) -> Source | None:
            return None if name == MODULE_OF[module] else super().read(name)

    found = judge("deepseek_v4", Without(tree("0.20.0").folder))
    assert found.state == "drifted" and MODULE_OF[module] in found.reason


@pytest.mark.parametrize("part", ["weights_proj", "fused_wkv_wgate", "fused_wqa_wkv"])
@pytest.mark.parametrize("version", ["0.20.1", "0.28.0", "0.33.0"])
def test_a_parallel_call_without_one_of_the_gemms_has_not_landed(version: str, part: str) -> None:
    name = judge("deepseek_v4", tree(version)).module
    assert name is not None
    source = tree(version).read(name)
    assert source is not None
    source = Source(source.text.replace(part, "something_else"), source.path)
    assert judge("deepseek_v4", ChangedTree(version, name, source)).state == "drifted"
