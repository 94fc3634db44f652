"""The costs of a compiled program's kernels, on a short module whose bytes and FLOPs are counted by hand."""

import json
from types import SimpleNamespace

import compiled
import hlo
import jax
import jax.numpy as jnp
import kernel_costs
import least
import predict
import pytest
from gpu_stages.programs import published_config
from jax import lax
from kernel_costs import ATTENTION, CONVOLUTION, COPY, ELEMENTWISE, OPTIMIZER, PRODUCT, RANDOM, REDUCTION, Kernel

from s2dm_jax.config.build import build_network
from s2dm_jax.models.flops import step_flops

_JVP = 'metadata={op_name="jit(chunk)/while/body/jvp()/OP"}'
_GEMM = (
    'backend_config={"operation_queue_id":"0","gemm_backend_config":{"alpha_real":1,"beta":0,"dot_dimension_numbers":'
    '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],'
    '"rhs_batch_dimensions":[]},"epilogue":"DEFAULT"}}'
)
# 2 images of 4 × 4 pixels with 8 channels; 5 steps; the inner loop runs 3 times.
_TEXT = f"""\
HloModule jit_chunk, is_scheduled=true

FileNames
1 "step.py"

%sum (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.9 = f32[] add(%a, %b)
}}

%fused_slice (p0: f32[100,4], p1: s32[], p2: f32[4]) -> f32[4] {{
  %p0 = f32[100,4]{{1,0}} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %converted = bf16[100,4]{{1,0}} convert(%p0), {_JVP}
  %row = bf16[1,4]{{1,0}} dynamic-slice(%converted, %p1, %zero), dynamic_slice_sizes={{1,4}}, {_JVP}
  %flat = bf16[4]{{0}} bitcast(%row)
  %wide = f32[4]{{0}} convert(%flat)
  %p2 = f32[4]{{0}} parameter(2)
  ROOT %scaled = f32[4]{{0}} multiply(%wide, %p2), {_JVP}
}}

%fused_update (p0.1: f32[100,4], p1.1: s32[], p2.1: f32[4]) -> f32[100,4] {{
  %p0.1 = f32[100,4]{{1,0}} parameter(0)
  %p2.1 = f32[4]{{0}} parameter(2)
  %row.1 = f32[1,4]{{1,0}} bitcast(%p2.1)
  %p1.1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  ROOT %written = f32[100,4]{{1,0}} dynamic-update-slice(%p0.1, %row.1, %p1.1, %zero.1)
}}

%fused_norm (p0.2: bf16[2,4,4,8]) -> (f32[2,8], bf16[2,4,4,8]) {{
  %p0.2 = bf16[2,4,4,8]{{3,2,1,0}} parameter(0)
  %x = f32[2,4,4,8]{{3,2,1,0}} convert(%p0.2), {_JVP}
  %none = f32[] constant(0)
  %total = f32[2,8]{{1,0}} reduce(%x, %none), dimensions={{1,2}}, to_apply=%sum, {_JVP}
  %squared = f32[2,4,4,8]{{3,2,1,0}} multiply(%x, %x), {_JVP}
  %small = bf16[2,4,4,8]{{3,2,1,0}} convert(%squared), {_JVP}
  ROOT %both = (f32[2,8]{{1,0}}, bf16[2,4,4,8]{{3,2,1,0}}) tuple(%total, %small)
}}

%fused_dot (p0.3: bf16[2,16,8], p1.3: bf16[2,16,8]) -> bf16[2,16,16] {{
  %p0.3 = bf16[2,16,8]{{2,1,0}} parameter(0)
  %p1.3 = bf16[2,16,8]{{2,1,0}} parameter(1)
  ROOT %scores = bf16[2,16,16]{{2,1,0}} dot(%p0.3, %p1.3), lhs_batch_dims={{0}}, lhs_contracting_dims={{2}}, \
rhs_batch_dims={{0}}, rhs_contracting_dims={{2}}, {_JVP}
}}

%inner (state.1: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %state.1 = (s32[], f32[4]{{0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %v.1 = f32[4]{{0}} get-tuple-element(%state.1), index=1
  %bits = f32[4]{{0}} add(%v.1, %v.1), metadata={{op_name="jit(chunk)/while/body/jit(_threefry_split)/add"}}
  ROOT %next.1 = (s32[], f32[4]{{0}}) tuple(%i.1, %bits)
}}

%more (state.2: (s32[], f32[4])) -> pred[] {{
  %state.2 = (s32[], f32[4]{{0}}) parameter(0)
  ROOT %yes = pred[] constant(true)
}}

%body (state: (s32[], f32[100,4], bf16[2,4,4,8], bf16[8,3,3,8], bf16[32,8], bf16[8,16], f32[4])) -> (s32[], \
f32[100,4], bf16[2,4,4,8], bf16[8,3,3,8], bf16[32,8], /*index=5*/bf16[8,16], f32[4]) {{
  %state = (s32[], f32[100,4]{{1,0}}, bf16[2,4,4,8]{{3,2,1,0}}, bf16[8,3,3,8]{{3,2,1,0}}, bf16[32,8]{{1,0}}, \
/*index=5*/bf16[8,16]{{1,0}}, f32[4]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %metrics = f32[100,4]{{1,0}} get-tuple-element(%state), index=1
  %image = bf16[2,4,4,8]{{3,2,1,0}} get-tuple-element(%state), index=2
  %weight = bf16[8,3,3,8]{{3,2,1,0}} get-tuple-element(%state), index=3
  %rows = bf16[32,8]{{1,0}} get-tuple-element(%state), index=4
  %kernel = bf16[8,16]{{1,0}} get-tuple-element(%state), index=5
  %vector = f32[4]{{0}} get-tuple-element(%state), index=6
  %slice_fusion = f32[4]{{0}} fusion(%metrics, %i, %vector), kind=kLoop, calls=%fused_slice, {_JVP}
  %conv = (bf16[2,4,4,8]{{3,2,1,0}}, u8[1000]{{0}}) custom-call(%image, %weight), window={{size=3x3 pad=1_1x1_1}}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", {_JVP}
  %y = bf16[2,4,4,8]{{3,2,1,0}} get-tuple-element(%conv), index=0
  %filter = (bf16[8,3,3,8]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%image, %y), window={{size=3x3 pad=1_1x1_1}}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter", {_JVP}
  %gemm = (bf16[32,16]{{1,0}}, s8[4096]{{0}}) custom-call(%rows, %kernel), \
custom_call_target="__cublas$lt$matmul", {_JVP}, {_GEMM}
  %norm = (f32[2,8]{{1,0}}, bf16[2,4,4,8]{{3,2,1,0}}) fusion(%y), kind=kInput, calls=%fused_norm, {_JVP}
  %tokens = bf16[2,16,8]{{2,1,0}} bitcast(%y)
  %attend = bf16[2,16,16]{{2,1,0}} fusion(%tokens, %tokens), kind=kCustom, calls=%fused_dot, {_JVP}
  %start = (s32[], f32[4]{{0}}) tuple(%i, %slice_fusion)
  %loop = (s32[], f32[4]{{0}}) while(%start), condition=%more, body=%inner, \
backend_config={{"known_trip_count":{{"n":"3"}}}}
  %drawn = f32[4]{{0}} get-tuple-element(%loop), index=1
  %silu = f32[4]{{0}} multiply(%drawn, %drawn), {_JVP}
  %adam = f32[4]{{0}} add(%vector, %silu), metadata={{op_name="jit(chunk)/while/body/add"}}
  %update_fusion = f32[100,4]{{1,0}} fusion(%metrics, %i, %silu), kind=kLoop, calls=%fused_update, {_JVP}
  ROOT %next = (s32[], f32[100,4]{{1,0}}, bf16[2,4,4,8]{{3,2,1,0}}, bf16[8,3,3,8]{{3,2,1,0}}, bf16[32,8]{{1,0}}, \
/*index=5*/bf16[8,16]{{1,0}}, f32[4]{{0}}) tuple(%i, %update_fusion, %y, %weight, %rows, %kernel, %adam)
}}

ENTRY %main (argument: (s32[], f32[100,4], bf16[2,4,4,8], bf16[8,3,3,8], bf16[32,8], bf16[8,16], f32[4])) -> f32[4] {{
  %argument = (s32[], f32[100,4]{{1,0}}, bf16[2,4,4,8]{{3,2,1,0}}, bf16[8,3,3,8]{{3,2,1,0}}, bf16[32,8]{{1,0}}, \
/*index=5*/bf16[8,16]{{1,0}}, f32[4]{{0}}) parameter(0)
  %while.1 = (s32[], f32[100,4]{{1,0}}, bf16[2,4,4,8]{{3,2,1,0}}, bf16[8,3,3,8]{{3,2,1,0}}, bf16[32,8]{{1,0}}, \
/*index=5*/bf16[8,16]{{1,0}}, f32[4]{{0}}) while(%argument), condition=%more, body=%body, \
backend_config={{"known_trip_count":{{"n":"5"}}}}
  %last = f32[4]{{0}} get-tuple-element(%while.1), index=6
  ROOT %copy.1 = f32[4]{{0}} copy(%last)
}}
"""
_IMAGE, _WEIGHT = 2 * 4 * 4 * 8 * 2, 8 * 3 * 3 * 8 * 2
_CONVOLUTION_FLOPS = 2 * (2 * 4 * 4 * 8) * (3 * 3 * 8)
# By hand: class, bytes, FLOPs, runs in a step.
_EXPECTED = {
    # Of 100 rows one is read, through the conversion, with the index and the factors; four sums are written.
    "slice_fusion": (ELEMENTWISE, 16 + 4 + 16 + 16, 0, 1),
    "conv": (CONVOLUTION, 2 * _IMAGE + _WEIGHT, _CONVOLUTION_FLOPS, 1),
    "filter": (CONVOLUTION, 2 * _IMAGE + _WEIGHT, _CONVOLUTION_FLOPS, 1),
    "gemm": (PRODUCT, (32 * 8 + 8 * 16 + 32 * 16) * 2, 2 * 32 * 16 * 8, 1),
    "norm": (REDUCTION, 2 * _IMAGE + 2 * 8 * 4, 0, 1),
    # The two factors are the same array, read once.
    "attend": (ATTENTION, _IMAGE + 2 * 16 * 16 * 2, 2 * 2 * 16 * 16 * 8, 1),
    "bits": (RANDOM, 2 * 16, 0, 3),
    "silu": (ELEMENTWISE, 2 * 16, 0, 1),
    "adam": (OPTIMIZER, 3 * 16, 0, 1),
    # In place: the row is read and written, and the index read.
    "update_fusion": (COPY, 16 + 4 + 16, 0, 1),
}


@pytest.fixture(scope="module")
def module():
    return hlo.parse(_TEXT)


def test_step_is_the_body_of_the_outer_loop(module):
    assert hlo.step_of(module) == ("body", 5)


def test_costs_equal_those_by_hand(module):
    found = {k.name: (k.kind, k.bytes, k.flops, k.times) for k in kernel_costs.step_kernels(module)}
    assert found == _EXPECTED


def test_program_has_the_kernels_outside_the_loop(module):
    kernels = kernel_costs.program_kernels(module)
    assert kernels.keys() == _EXPECTED.keys() | {"copy.1"}
    assert kernels["copy.1"] == Kernel("copy.1", COPY, 32, 0, 1)
    assert kernels["bits"].times == 15


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("HloModule nothing\n")


def _instruction(line):
    module = hlo.parse(f"ENTRY %main () -> f32[] {{\n{line}\n}}\n")
    return module, module.computations["main"], list(module.computations["main"].instructions.values())[-1]


@pytest.mark.parametrize(
    ("target", "result", "operands"),
    [
        ("__cudnn$convForward", "bf16[2,2,2,16]", ("bf16[2,4,4,8]", "bf16[16,3,3,8]")),
        ("__cudnn$convBackwardInput", "bf16[2,4,4,8]", ("bf16[2,2,2,16]", "bf16[16,3,3,8]")),
        ("__cudnn$convBackwardFilter", "bf16[16,3,3,8]", ("bf16[2,4,4,8]", "bf16[2,2,2,16]")),
    ],
)
def test_three_passes_of_a_strided_convolution_have_the_same_flops(target, result, operands):
    parameters = "\n".join(f"  %p{i} = {shape} parameter({i})" for i, shape in enumerate(operands))
    call = (
        f"  ROOT %c = ({result}, u8[7]) custom-call(%p0, %p1), window={{size=3x3 pad=0_1x0_1 stride=2x2}}, "
        f'dim_labels=b01f_o01i->b01f, custom_call_target="{target}"'
    )
    module, computation, instruction = _instruction(f"{parameters}\n{call}")
    flops = kernel_costs.instruction_flops(module, computation, instruction)
    assert flops == 2 * (2 * 2 * 2 * 16) * (3 * 3 * 8)


def test_holes_of_a_dilated_input_do_not_count():
    text = """\
  %p0 = f32[2,2,2,16] parameter(0)
  %p1 = f32[3,3,8,16] parameter(1)
  ROOT %c = f32[2,4,4,8] convolution(%p0, %p1), window={size=3x3 pad=2_1x2_1 lhs_dilate=2x2}, \
dim_labels=b01f_01oi->b01f"""
    module, computation, instruction = _instruction(text)
    flops = kernel_costs.instruction_flops(module, computation, instruction)
    assert flops == 2 * (2 * 2 * 2 * 16) * (3 * 3 * 8)


def test_bytes_and_flops_agree_with_xla():
    program = jax.jit(lambda x, w: jnp.tanh(x @ w)).lower(jnp.ones((256, 128)), jnp.ones((128, 64))).compile()
    kernels = kernel_costs.step_kernels(hlo.parse(program.as_text()))
    costs = program.cost_analysis()
    assert sum(k.flops for k in kernels) == 2 * 256 * 128 * 64 == costs["flops"]
    assert sum(k.bytes for k in kernels) == costs["bytes accessed"]


def test_flops_of_a_compiled_step_are_three_times_those_forward():
    def loss(weights, x):
        y = lax.conv_general_dilated(x, weights[0], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.sum(jnp.tanh(y.reshape(-1, 16) @ weights[1]) ** 2)

    def chunk(weights, images):
        def step(weights, x):
            # The gradient of the image is wanted too, as inside a network.
            grads, dx = jax.grad(loss, argnums=(0, 1))(weights, x)
            return [w - 0.1 * g for w, g in zip(weights, grads, strict=True)], dx

        return lax.scan(step, weights, images)

    weights = [jnp.ones((3, 3, 8, 16)), jnp.ones((16, 24))]
    program = jax.jit(chunk).lower(weights, jnp.ones((4, 2, 16, 16, 8))).compile()
    module = hlo.parse(program.as_text())
    assert hlo.step_of(module)[1] == 4
    forward = 2 * (2 * 16 * 16 * 16) * (3 * 3 * 8) + 2 * (2 * 16 * 16) * 16 * 24
    assert sum(k.times * k.flops for k in kernel_costs.step_kernels(module)) == 3 * forward


def test_least_bytes_of_a_network_by_hand():
    class Network:
        """A convolution to 4 channels, attention over the pixels, a product."""

        image_shape, dtype = (4, 4, 2), "bfloat16"

        def param_shapes(self):
            shapes = {"c": (3, 3, 2, 4), "d": (4, 4)}
            return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

        def apply(self, params, x, t):
            x, c, d = (a.astype(jnp.bfloat16) for a in (x, params["c"], params["d"]))
            y = lax.conv_general_dilated(x, c, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            tokens = jax.nn.silu(y).reshape(len(x), 16, 1, 4)
            return jax.nn.dot_product_attention(tokens, tokens, tokens) @ d

    kernels = least.least_kernels(Network(), 3)
    found = {kind: sum(k.times * k.bytes for k in kernels if k.kind == kind) for kind in kernel_costs.CLASSES}
    image, y, c, d = 2 * 3 * 16 * 2, 2 * 3 * 16 * 4, 2 * 9 * 2 * 4, 2 * 4 * 4
    assert found == {
        CONVOLUTION: 3 * (image + c + y),
        PRODUCT: 3 * (y + d + y),
        ATTENTION: 4 * y + 8 * y,
        # Of both: y read twice and its gradient written; the input written and its gradient read.
        ELEMENTWISE: (3 * y + 2 * image) + (3 * y + 2 * y),
        OPTIMIZER: (9 * 2 * 4 + 4 * 4) * (9 * 4 + 2),
        REDUCTION: 0,
        RANDOM: 0,
        COPY: 0,
    }
    flops = {kind: sum(k.times * k.flops for k in kernels if k.kind == kind) for kind in (CONVOLUTION, ATTENTION)}
    assert flops == {CONVOLUTION: 3 * 2 * (3 * 16 * 4) * 9 * 2, ATTENTION: 3 * 2 * (2 * 3 * 16 * 16 * 4)}


def test_prediction_takes_the_slower_of_arithmetic_and_memory():
    kernels = [Kernel("a", CONVOLUTION, 10, 4000, 2), Kernel("b", ELEMENTWISE, 30, 0, 1)]
    least_kernels = [Kernel("a", CONVOLUTION, 10, 4000, 2), Kernel("b", ELEMENTWISE, 10, 0, 1)]
    found = predict.predict(kernels, least_kernels, rate=1e6, bandwidth=1e4, images=7, flops=8000)
    # Two of 4 ms, and one of 3 ms, of which 1 ms is needed.
    assert (found["ms"], found["least_ms"]) == (pytest.approx(11), pytest.approx(9))
    assert found["images_per_s"] == pytest.approx(7 / 0.011)
    assert found["share_of_rate"] == pytest.approx(8 / 11)
    assert found["short_kernels"] == 0
    rows = predict.table(found).splitlines()
    assert rows[2] == "| convolution | 2 | 0 | 0.00 | 0.00 | 8.00 | 8.00 |"
    assert rows[-1].endswith("| 11.00 | 9.00 |")


def test_kernels_shorter_than_their_start_are_counted():
    kernels = [Kernel("a", COPY, 1000, 0, 3)]
    found = predict.predict(kernels, kernels, rate=1e12, bandwidth=1e9, images=1, flops=0)
    assert (found["short_kernels"], found["ms"]) == (3, pytest.approx(3e-3))
    assert found["ms_with_launches"] == pytest.approx(6e-3)


def test_compiled_predicts_for_a_device_s_share_of_the_batch():
    arguments = SimpleNamespace(target="h100", config="configs/digits.py", devices=2, rate=1.0, bandwidth=None)
    config = published_config("configs/digits.py:ddpm", tiny=True)
    network = build_network(config)
    found = compiled._predict(arguments, config, network, _TEXT)
    assert (found["config"], found["batch_per_device"], found["K"]) == ("configs/digits.py", 2, 1)
    assert (found["rate_tflops"], found["bandwidth_tb_per_s"]) == (1, 3.35)
    assert found["step_gflop"] == step_flops(network, 2, 1) / 1e9
    assert found["classes"][CONVOLUTION]["kernels"] == 2
    assert json.loads(json.dumps(found)) == found
