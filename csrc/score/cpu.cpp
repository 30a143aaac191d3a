// The score on the CPU: which work there is, in which order, on which memory. The arithmetic is in cpu_simd.cpp.
//
// An item is one (layer, sequence, KV head): the look-ahead rows of all query heads that share its keys. Items run in
// waves that fit the scratch memory. In a wave, threads first turn tiles of keys into weights (each key read once),
// then each row's denominator is put together in tile order, then threads pool tiles of positions over all items of the
// wave and fold them into the state. Every element is computed by the same instructions wherever it lies and whoever
// runs it, and a maximum has no order: so results are the same bit for bit for any number of threads, batch or scratch
// memory.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "common/arena.h"
#include "common/dtype.h"
#include "common/guarded.h"
#include "common/parallel.h"
#include "common/status.h"
#include "score/check.h"
#include "score/cpu_kernels.h"

namespace specprefill {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr int64_t kPadding = 16;  // floats: the widest vector
// Weights that a wave should hold: enough tiles for the threads to share out, few enough to stay near the cores.
constexpr size_t kWaveBytes = size_t{4} << 20;
constexpr size_t kMaxItems = 256;  // that a fold walks through at most, for each position tile and row

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

struct Item {
  int64_t layer, b, head;
  int64_t rows, group;        // look-ahead rows; query heads that share this KV head
  int64_t length, readable;   // prompt tokens; tokens with keys that are read
  int64_t tiles, first_tile;  // first_tile: position among all tiles of the wave
  int64_t stride, stats_stride;
  KeySource keys;
  float *query, *weights, *maxima, *sums, *lse;
  int64_t *begin, *end;

  int64_t num_rows() const { return rows * group; }
};

// Memory of an item, in the order in which it is used. With a counting arena the pointers are null.
void place(Item& item, int64_t head_dim, bool has_lse, Arena& arena) {
  const int64_t rows = round_up(item.num_rows(), score_kernels().block_rows);
  item.tiles = (item.readable + kTile - 1) / kTile;
  // A stride that is no multiple of 4 KiB: else the rows of a block would compete for the same cache sets.
  item.stride = item.tiles * kTile + kPadding;
  item.stats_stride = round_up(item.tiles, kPadding);
  item.query = arena.take<float>(rows, head_dim);
  item.maxima = arena.take<float>(item.num_rows(), item.stats_stride);
  item.sums = arena.take<float>(item.num_rows(), item.stats_stride);
  item.lse = has_lse ? arena.take<float>(item.num_rows()) : nullptr;
  item.begin = arena.take<int64_t>(item.num_rows());
  item.end = arena.take<int64_t>(item.num_rows());
  item.weights = arena.take<float>(item.num_rows(), item.stride);
}

// Windows of 2 * length - 1 tokens and more hold the whole prompt wherever they are centred: their sums are one sum.
int64_t pool_width(int64_t pool_kernel_size, int64_t length) { return std::min(pool_kernel_size, 2 * length - 1); }

// Scratch of one thread.
struct Scratch {
  float *panel, *window, *sums, *best;

  Scratch(int64_t head_dim, int64_t pool_width, Arena& arena)
      : panel(arena.take<float>(head_dim, score_kernels().panel_keys)),
        window(arena.take<float>(kTile + pool_width + 2 * kPadding)),
        sums(arena.take<float>(kTile + kPadding)),
        best(arena.take<float>(kTile + kPadding)) {}
};

class Scorer {
 public:
  Scorer(const specprefill_score& args, const specprefill_layer* layers, int64_t num_layers, int num_threads)
      : args_(args),
        layers_(layers),
        num_threads_(clamp_threads(num_threads)),
        pool_width_(pool_width(args.pool_kernel_size, args.max_len)) {
    for (int64_t i = 0; i < num_layers; ++i) head_dim_ = std::max(head_dim_, layers[i].head_dim);
    for (int64_t i = 0; i < num_layers; ++i) {
      for (int64_t b = 0; b < args.batch; ++b) {
        for (int64_t head = 0; head < layers[i].num_kv_heads; ++head) items_.push_back(make_item(i, b, head));
      }
    }
  }

  // Least and best amount of scratch memory.
  void sizes(size_t* least, size_t* best) const {
    size_t largest = 0, all = 0;
    for (Item item : items_) {
      Arena count;
      place(item, layer(item).head_dim, layer(item).lse, count);
      largest = std::max(largest, count.used());
      all += count.used();
    }
    Arena count;
    for (int i = 0; i < num_threads_; ++i) Scratch(head_dim_, pool_width_, count);
    *least = count.used() + largest + Arena::kAlign;
    *best = count.used() + std::max(largest, std::min(all, kWaveBytes)) + Arena::kAlign;
  }

  int run(Arena arena) {
    for (int i = 0; i < num_threads_; ++i) scratch_.emplace_back(head_dim_, pool_width_, arena);
    const size_t start = arena.used();
    for (size_t first = 0; first < items_.size();) {
      arena.rewind(start);
      size_t last = first;
      for (int64_t tiles = 0; last < items_.size() && last - first < kMaxItems; ++last) {
        Item& item = items_[last];
        const size_t before = arena.used();
        place(item, layer(item).head_dim, layer(item).lse, arena);
        if (arena.used() > arena.capacity() && last > first) {
          arena.rewind(before);
          break;
        }
        item.first_tile = tiles;
        tiles += item.tiles;
      }
      SPECPREFILL_TRY(wave(&items_[first], &items_[last]));
      first = last;
    }
    return SPECPREFILL_OK;
  }

 private:
  const specprefill_layer& layer(const Item& item) const { return layers_[item.layer]; }

  Item make_item(int64_t index, int64_t b, int64_t head) const {
    const specprefill_layer& layer = layers_[index];
    const int64_t bytes = item_bytes(layer.key_dtype);
    Item item{};
    item.layer = index, item.b = b, item.head = head;
    item.rows = rows_of(args_, b), item.group = layer.num_q_heads / layer.num_kv_heads;
    item.length = prompt_length(args_, b), item.readable = readable_length(args_, b);
    int64_t offset = head * layer.key_stride_head;
    if (args_.layout == SPECPREFILL_DENSE) offset += b * layer.key_stride_row;
    if (args_.layout == SPECPREFILL_PACKED) offset += args_.cu_seqlens[b] * layer.key_stride_token;
    const bool paged = args_.layout == SPECPREFILL_PAGED;
    item.keys = {static_cast<const char*>(layer.key) + offset * bytes,
                 layer.key_stride_token * bytes,
                 layer.key_stride_dim * bytes,
                 paged ? args_.block_table + b * args_.block_table_stride : nullptr,
                 layer.key_tokens,
                 layer.key_stride_row * bytes,
                 layer.key_dtype,
                 layer.head_dim};
    return item;
  }

  int wave(Item* first, Item* last) {
    for (Item* item = first; item != last; ++item) prepare(*item);
    const Item& end = last[-1];
    parallel_for(end.first_tile + end.tiles, num_threads_, [&](int64_t task, int worker) {
      const Item* item =
          std::upper_bound(first, last, task, [](int64_t tile, const Item& it) { return tile < it.first_tile; }) - 1;
      score_kernels().score_tile(tile_of(*item, task - item->first_tile, scratch_[worker].panel));
    });
    for (Item* item = first; item != last; ++item) SPECPREFILL_TRY(normalize(*item));
    fold(first, last);
    return SPECPREFILL_OK;
  }

  // Packs an item's queries, and what each of its rows sees. Row m is look-ahead row m % rows of head m / rows.
  void prepare(Item& item) {
    const specprefill_layer& layer = this->layer(item);
    const int64_t block = score_kernels().block_rows, bytes = item_bytes(layer.query_dtype);
    const float key_scale = layer.key_scale ? layer.key_scale[item.head * layer.key_scale_stride] : 1.0f;
    // Products come out as exponents of 2, or, with a soft cap, as the argument of its tanh.
    const double unit = args_.softcap != 0 ? 1.0 / args_.softcap : kLog2E;
    const float factor = static_cast<float>(static_cast<double>(layer.scale) * key_scale * unit);
    std::fill_n(item.query, round_up(item.num_rows(), block) * layer.head_dim, 0.0f);
    for (int64_t m = 0; m < item.num_rows(); ++m) {
      float* out = item.query + m / block * block * layer.head_dim + m % block;
      const int64_t n = m % item.rows, head = item.head * item.group + m / item.rows;
      const char* q =
          static_cast<const char*>(layer.query) +
          (item.b * layer.query_stride_batch + n * layer.query_stride_row + head * layer.query_stride_head) * bytes;
      for (int64_t d = 0; d < layer.head_dim; ++d) {
        out[d * block] = to_float(q + d * layer.query_stride_dim * bytes, layer.query_dtype) * factor;
      }
    }
    for (int64_t m = 0; m < item.num_rows(); ++m) {
      const int64_t n = m % item.rows, head = item.head * item.group + m / item.rows;
      const bool look_ahead = args_.queries == SPECPREFILL_LOOK_AHEAD;
      const int64_t position = look_ahead ? item.length - 1 + n : item.length - item.rows + n;
      item.end[m] = std::min(position + 1, item.readable);
      item.begin[m] = layer.window ? std::max<int64_t>(position - layer.window + 1, 0) : 0;
      if (item.lse) {
        const float lse =
            layer.lse[item.b * layer.lse_stride_batch + n * layer.lse_stride_row + head * layer.lse_stride_head];
        item.lse[m] = static_cast<float>(lse * kLog2E);
      }
      for (int64_t i = item.tiles; i < item.stats_stride; ++i) {
        item.maxima[m * item.stats_stride + i] = -std::numeric_limits<float>::infinity();
        item.sums[m * item.stats_stride + i] = 0;
      }
    }
  }

  ScoreTile tile_of(const Item& item, int64_t index, float* panel) const {
    const int64_t first = index * kTile;
    return {item.keys,
            item.query,
            item.num_rows(),
            first,
            std::min(kTile, item.readable - first),
            item.begin,
            item.end,
            item.lse,
            static_cast<float>(args_.softcap * kLog2E),
            item.weights,
            item.stride,
            item.maxima,
            item.sums,
            item.stats_stride,
            panel};
  }

  int normalize(Item& item) const {
    for (int64_t m = 0; m < item.num_rows(); ++m) {
      float* maxima = item.maxima + m * item.stats_stride;
      const float* sums = item.sums + m * item.stats_stride;
      bool finite = true;
      if (item.lse) {
        for (int64_t i = 0; i < item.tiles; ++i) finite &= std::isfinite(sums[i]);
        std::fill_n(maxima, item.tiles, 1.0f);
      } else {
        finite = score_kernels().combine(maxima, sums, item.stats_stride);
      }
      if (!finite) {
        return fail(
            SPECPREFILL_NOT_FINITE,
            "%s of sequence %lld: expected finite attention weights, got NaN or Inf (layer %lld, query head %lld, "
            "look-ahead row %lld)",
            item.lse ? "lse, query or key" : "query or key", static_cast<long long>(item.b),
            static_cast<long long>(item.layer), static_cast<long long>(item.head * item.group + m / item.rows),
            static_cast<long long>(m % item.rows));
      }
    }
    return SPECPREFILL_OK;
  }

  void fold(const Item* first, const Item* last) {
    const int64_t tiles = (args_.max_len + kTile - 1) / kTile;
    parallel_for(args_.batch * tiles, num_threads_, [&](int64_t task, int worker) {
      const int64_t b = task / tiles, start = task % tiles * kTile;
      const int64_t length = prompt_length(args_, b);
      if (start >= length) return;
      const bool any = std::any_of(first, last, [b](const Item& item) { return item.b == b; });
      for (int64_t n = 0; any && n < rows_of(args_, b); ++n) {
        fold_row(first, last, b, n, start, std::min(kTile, length - start), scratch_[worker]);
      }
    });
  }

  // The maximum over the wave's heads and layers at look-ahead row n, pooled, into the state.
  void fold_row(const Item* first, const Item* last, int64_t b, int64_t n, int64_t start, int64_t count,
                Scratch& scratch) {
    const int64_t length = prompt_length(args_, b);
    // By this prompt's length, not the batch's: the order of additions must be the one it has alone.
    const int64_t width = pool_width(args_.pool_kernel_size, length);
    std::fill_n(scratch.best, kTile + kPadding, 0.0f);
    for (const Item* item = first; item != last; ++item) {
      if (item->b != b) continue;
      for (int64_t m = n; m < item->num_rows(); m += item->rows) {
        score_kernels().pool_max({item->weights + m * item->stride, item->maxima + m * item->stats_stride, length,
                                  start, count, width, scratch.window, scratch.sums},
                                 scratch.best);
      }
    }
    float* state =
        args_.state + b * args_.state_stride_batch + (args_.state_rows == 1 ? 0 : n) * args_.state_stride_row + start;
    const bool valid_edge = args_.pool_edge == SPECPREFILL_POOL_VALID;
    score_kernels().fold(scratch.best, state, start, count, length, width,
                         valid_edge ? 0.0f : static_cast<float>(args_.pool_kernel_size));
  }

  const specprefill_score& args_;
  const specprefill_layer* layers_;
  int num_threads_;
  int64_t pool_width_;
  int64_t head_dim_ = 1;
  std::vector<Item> items_;
  std::vector<Scratch> scratch_;
};

// SPECPREFILL_INSTRUCTION_SET in the environment is an upper bound, to test or to compare; another word bounds nothing.
[[maybe_unused]] bool allowed(int level) {
  static constexpr const char* kNames[] = {"generic", "avx2", "avx512"};
  const char* bound = std::getenv("SPECPREFILL_INSTRUCTION_SET");
  for (int i = 0; bound && i < 3; ++i) {
    if (!std::strcmp(bound, kNames[i])) return level <= i;
  }
  return true;
}

const ScoreKernels& best_kernels() {
#if defined(SPECPREFILL_HAVE_AVX512)
  if (allowed(2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return avx512::score_kernels;
  }
#endif
#if defined(SPECPREFILL_HAVE_AVX2)
  // Every processor with AVX2 and FMA so far has F16C too; not every compiler can ask for it.
  if (allowed(1) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::score_kernels;
#endif
  return generic::score_kernels;
}

}  // namespace

const ScoreKernels& score_kernels() {
  static const ScoreKernels& kernels = best_kernels();
  return kernels;
}

}  // namespace specprefill

using namespace specprefill;

const char* specprefill_instruction_set(void) { return score_kernels().name; }

size_t specprefill_score_workspace_size(int64_t look_ahead, int64_t group, int64_t head_dim, int64_t max_len,
                                        int64_t pool_kernel_size, int num_threads) {
  size_t bytes = 0;
  guarded("score_workspace_size", [&] {
    for (int64_t size : {look_ahead, group, head_dim, max_len}) {
      SPECPREFILL_REQUIRE(size >= 1 && size <= kMaxSize, "sizes: expected 1 to 2^31 - 1, got %lld",
                          static_cast<long long>(size));
    }
    SPECPREFILL_REQUIRE(pool_kernel_size >= 1, "pool_kernel_size: expected at least 1, got %lld",
                        static_cast<long long>(pool_kernel_size));
    Item item{};
    item.rows = look_ahead, item.group = group;
    item.readable = max_len + look_ahead - 1;
    Arena count;
    place(item, head_dim, true, count);
    for (int i = 0; i < clamp_threads(num_threads); ++i)
      Scratch(head_dim, pool_width(pool_kernel_size, max_len), count);
    bytes = count.used() + Arena::kAlign;
    return static_cast<int>(SPECPREFILL_OK);
  });
  return bytes;
}

int specprefill_score_layers_cpu(const specprefill_score* args, const specprefill_layer* layers, int64_t num_layers,
                                 void* workspace, size_t workspace_bytes, int num_threads) {
  return guarded("score_layers", [&]() -> int {
    SPECPREFILL_REQUIRE(args, "args: expected a specprefill_score, got a null pointer");
    SPECPREFILL_TRY(check_score(*args, layers, num_layers));
    Scorer scorer(*args, layers, num_layers, num_threads);
    size_t least, best;
    scorer.sizes(&least, &best);
    if (workspace) {
      SPECPREFILL_REQUIRE(workspace_bytes >= least, "workspace: expected at least %zu bytes, got %zu", least,
                          workspace_bytes);
      return scorer.run(Arena(workspace, workspace_bytes));
    }
    const std::unique_ptr<char, decltype(&std::free)> memory(static_cast<char*>(std::malloc(best)), &std::free);
    if (!memory) throw std::bad_alloc();
    return scorer.run(Arena(memory.get(), best));
  });
}
