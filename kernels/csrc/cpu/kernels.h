// What a recorded operation is, what one step gives it, and the table of kernels that an
// instruction set provides.
//
// A program is a list of `Op`. A kernel says how many items of work an op is in a step, and computes
// any range of them on any thread. Matrices of activations have one row per token of the step (T) or per
// row whose logits are wanted (R); the model fixes columns and addresses, the step T and R.
//
// Three rules keep a row's result independent of what shares its step:
//   - rows and columns past the end may hold anything but are never read into a valid result;
//     columns between the end of a row and the next multiple of 32 are zero for ever (nobody writes
//     them), because matmuls multiply them by zero weights and 0 * NaN is not 0;
//   - sums over K and over the context have one order, whatever the number of rows;
//   - tokens of a block behind the end of its sequence's context are skipped or zeroed.
//
// The structs here are mirrored by ctypes in kernels/cpu/library.py.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "numbers.h"

namespace quire {

constexpr int kBlockTokens = 16;
constexpr int kMaxHeadDim = 256;

// Output columns of a packed panel; activations are padded to whole panels of K as well.
constexpr int kPanel = 32;

enum class OpCode : int32_t {
  kEmbed = 0,
  kRmsNorm = 1,
  kLinear = 2,
  kRopeAndCache = 3,
  kAttention = 4,
  kTakeRows = 5,
  kSumParts = 6,
  kJoinColumns = 7,
  kFixedPoint = 8,
  kQuantizedLinear = 9,
  kNormFixedPoint = 10,
  kCount = 11,
};

enum class Domain : int32_t { kTokens = 0, kLogitRows = 1 };

// What a matmul does with its result.
enum class Epilogue : int32_t {
  kStore = 0,         // out = result, in the activations' format
  kStoreFloat = 1,    // out = result, float32
  kAddFloat = 2,      // out += result, float32 (residual stream)
  kSiluMul = 3,       // panel = 16 gate columns, 16 up columns; out = silu(gate) * up
};

struct Matrix {
  void* data;
  int64_t stride;  // elements between rows
};

struct EmbedArgs {
  const void* table;   // packed like a linear's weights [rows, H]
  int64_t rows;        // of the table: the whole vocabulary, or one rank's part of it
  int64_t columns;     // H
  Matrix out;          // float32; zero for token ids of other parts
  int64_t first;       // token id of the table's first row
  int64_t vocabulary;  // V over all parts
};

struct RmsNormArgs {
  Matrix in;   // float32
  Matrix out;  // activations
  const float* weight;
  int64_t columns;
  float eps;
};

struct LinearArgs {
  const void* weights;  // packed [n, k]
  const float* bias;    // [n rounded up to whole panels] or null
  Matrix in;            // activations
  Matrix out;
  int64_t k;
  int64_t n;  // columns of the packed matrix (gate and up together for kSiluMul)
  Epilogue epilogue;
};

// Activations made ready for kQuantizedLinear; see fixed_point.h.
struct FixedPointArgs {
  Matrix in;             // activations
  Matrix out;            // int16
  const int32_t* order;  // [k] column of `in` that goes to each place, or null
  int64_t k;
  int64_t block;  // elements that share a scale, a multiple of 16
};

constexpr int64_t kMaxFixedBlock = 128;

// A norm and, while a row is in the cache, what its result is for: `fixed_point.in` is `norm.out`.
struct NormFixedPointArgs {
  RmsNormArgs norm;
  FixedPointArgs fixed_point;
};

struct QuantizedLinearArgs {
  LinearArgs linear;  // weights as quantized_layout.h says; `in` is fixed point
  int64_t group_size;
  int64_t block;  // divides the group size where there are several groups
  int32_t bits;
  int32_t has_zeros;
};

struct HeadShape {
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t layer;
};

struct RopeArgs {
  Matrix qkv;  // activations; q heads, k heads, v heads
  HeadShape shape;
  const float* cos;  // [max_positions, rotary_dim / 2]
  const float* sin;
  const float* q_norm;  // [head_dim] or null
  const float* k_norm;
  int64_t max_positions;
  int64_t rotary_dim;
  float eps;
};

struct AttentionArgs {
  Matrix qkv;  // activations; only the q heads are read
  Matrix out;  // activations [num_heads * head_dim]
  HeadShape shape;
  int64_t window;  // 0: unlimited
  float scale;
};

struct TakeRowsArgs {
  Matrix in;   // stride in bytes
  Matrix out;  // stride in bytes
  int64_t row_bytes;
};

// What the ranks of a tensor-parallel group gave, one part after the other:
// parts [num_parts][rows of the step][columns] float32, without gaps.
struct PartsArgs {
  const float* parts;
  int64_t num_parts;
  int64_t columns;     // of a part
  Matrix out;          // float32
  int32_t accumulate;  // kSumParts: add to what `out` holds
};

struct Op {
  OpCode code;
  Domain domain;  // of the rows computed
  union {
    EmbedArgs embed;
    RmsNormArgs rms_norm;
    LinearArgs linear;
    RopeArgs rope;
    AttentionArgs attention;
    TakeRowsArgs take_rows;
    PartsArgs parts;
    FixedPointArgs fixed_point;
    QuantizedLinearArgs quantized;
    NormFixedPointArgs norm_fixed_point;
  };
};

// The KV pool: [block][kv head][layer][K tile | V tile], see kernels/layout.py.
struct Cache {
  char* pool;
  int64_t num_blocks;
  int64_t num_layers;
  int64_t num_kv_heads;
  int64_t head_dim;

  // Bytes of the K or V tile of one head and layer.
  int64_t tile_bytes(DType dtype) const { return kBlockTokens * head_dim * dtype_bytes(dtype); }
  int64_t block_bytes(DType dtype) const {
    return num_kv_heads * num_layers * 2 * tile_bytes(dtype);
  }
};

// The step's inputs as they come from Python; see StepInputs in kernels/ops.py.
struct StepArgs {
  const int32_t* token_ids;
  const int32_t* positions;
  const int32_t* query_start;
  const int32_t* context_lens;
  const int32_t* block_tables;
  const int32_t* logit_rows;
  int64_t block_table_stride;
  int64_t num_tokens;
  int64_t num_seqs;
  int64_t num_logit_rows;
};

// Consecutive rows of one sequence whose keys and values lie in one block.
struct BlockRun {
  int32_t row;
  int32_t count;
  int32_t block;
  int32_t slot;  // of the first row within the block
};

// Consecutive rows of one sequence that attend together.
struct QueryGroup {
  int32_t sequence;
  int32_t row;
  int32_t count;
};

// A step as the kernels see it: its inputs, the cache, and the work lists derived once per step.
struct Step {
  StepArgs args;
  DType dtype;
  Cache cache;
  std::vector<BlockRun> runs;
  std::vector<QueryGroup> groups;

  int64_t rows(Domain domain) const {
    return domain == Domain::kTokens ? args.num_tokens : args.num_logit_rows;
  }
  const int32_t* block_table(int64_t sequence) const {
    return args.block_tables + sequence * args.block_table_stride;
  }
  char* k_tile(int64_t block, int64_t kv_head, int64_t layer) const {
    const int64_t tile = (kv_head * cache.num_layers + layer) * 2;
    return cache.pool + block * cache.block_bytes(dtype) + tile * cache.tile_bytes(dtype);
  }
  char* v_tile(int64_t block, int64_t kv_head, int64_t layer) const {
    return k_tile(block, kv_head, layer) + cache.tile_bytes(dtype);
  }
};

// Attention gathers the queries of up to this many (token, head) rows per key and value tile read.
constexpr int kAttentionRows = 32;

// Query heads of one KV head are taken together, and as many tokens as fill the rows.
inline int64_t tokens_per_group(const HeadShape& shape) {
  const int64_t heads = shape.num_heads / shape.num_kv_heads;
  return heads >= kAttentionRows ? 1 : kAttentionRows / heads;
}

// Memory that a later op reads: lines of 64 bytes, in spans of one size. See fetch.h.
struct Fetch {
  const char* const* spans = nullptr;  // addresses less `offset`; the next one to start
  int64_t offset = 0;
  int64_t span_lines = 0;
  const char* at = nullptr;  // in the span that was started
  int64_t span_left = 0;     // lines
  int64_t left = 0;          // lines in all
};

// The matmul after this one, and the item of it that the calling thread begins with.
struct NextLinear {
  const LinearArgs* args = nullptr;  // null: this one goes on behind the items of this call
  int64_t item = 0;
};

// What a call of a kernel has to itself.
struct Workspace {
  char* scratch;    // the calling thread's, aligned to 64 bytes
  Fetch fetch;      // what to bring into the caches meanwhile, where the op leaves memory idle
  NextLinear next;  // whose weights to fetch behind the last ones of this call
};

struct Kernel {
  // Items of work that the op is in this step.
  int64_t (*items)(const Op& op, const Step& step);
  // Computes items [begin, end).
  void (*run)(const Op& op, const Step& step, int64_t begin, int64_t end, Workspace& space);
};

struct Kernels {
  const char* name;
  Kernel of[static_cast<int>(OpCode::kCount)];
  // Called by each thread when a program ends: gives back what makes a context switch dear.
  void (*release)();
  // Work space that each thread needs.
  int64_t scratch_bytes;
};

// Each returns its table; defined in kernels_<isa>.cpp where the compiler can build it.
const Kernels& generic_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
const Kernels& amx_kernels();

// The best table that was built and that this machine can run, or the one that the environment
// variable QUIRE_CPU_ISA (generic, avx2, avx512, avx512_bf16, amx) lowers the choice to. Chosen once.
const Kernels& kernels();

}  // namespace quire
