// The score on the CPU: which work there is, in which order, on which memory. The arithmetic is in cpu_simd.cpp.
//
// An item is one (layer, sequence, KV head): the look-ahead rows of all query heads that share its keys, laid side by
// side in vectors (lanes.h). Items run in waves that fit the scratch memory. In a wave, threads first turn tiles of
// keys into weights (each key read once), then each row's denominator is put together in tile order, then threads pool
// tiles of positions over all items of the wave and fold them into the state. Every element is computed by the same
// instructions wherever it lies and whoever runs it, and a maximum has no order: so results are the same bit for bit
// for any number of threads, batch or scratch memory.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/arena.h"
#include "common/dtype.h"
#include "common/guarded.h"
#include "common/parallel.h"
#include "common/processor.h"
#include "common/scratch.h"
#include "common/status.h"
#include "score/check.h"
#include "score/cpu_kernels.h"
#include "score/lanes.h"

namespace specprefill {
namespace {

constexpr double kLog2E = 1.4426950408889634;
// Weights that a wave should hold: enough tiles for the threads to share out, few enough to stay near the cores.
constexpr size_t kWaveBytes = size_t{4} << 20;
constexpr size_t kMaxItems = 256;  // that a fold walks through at most, for each position tile and row

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

struct Item {
  int64_t layer, b, head;
  int64_t group;              // query heads that share this KV head
  RowLanes lanes;             // of its query rows
  int64_t length, readable;   // prompt tokens; tokens with keys that are read
  int64_t tiles, first_tile;  // first_tile: position among all tiles of the wave
  KeySource keys;
  float *query, *weights, *maxima, *sums, *lse, *present;
  int32_t *begin, *end;
};

// Memory of an item, in the order in which it is used. With a counting arena the pointers are null.
void place(Item& item, int64_t head_dim, bool has_lse, Arena& arena) {
  const int64_t rows = item.lanes.size();
  item.tiles = (item.readable + kTile - 1) / kTile;
  item.query = arena.take<float>(rows, head_dim);
  item.present = arena.take<float>(rows);
  item.begin = arena.take<int32_t>(rows);
  item.end = arena.take<int32_t>(rows);
  item.lse = has_lse ? arena.take<float>(rows) : nullptr;
  item.maxima = arena.take<float>(rows, item.tiles);
  item.sums = arena.take<float>(rows, item.tiles);
  item.weights = arena.take<float>(rows, item.tiles * kTile);
}

// Windows of 2 * length - 1 tokens and more hold the whole prompt wherever they are centred: their sums are one sum.
int64_t pool_width(int64_t pool_kernel_size, int64_t length) { return std::min(pool_kernel_size, 2 * length - 1); }

// Scratch of one thread.
struct Scratch {
  float *panel, *window, *sums, *best;

  Scratch(int64_t head_dim, int64_t pool_width, int64_t blocks, Arena& arena)
      : panel(arena.take<float>(round_up(head_dim, lanes()), score_kernels().panel_keys)),
        window(arena.take<float>(kTile + pool_width + 1, lanes())),
        sums(arena.take<float>(kTile, lanes())),
        best(arena.take<float>(kTile, blocks * lanes())) {}

  static int64_t lanes() { return score_kernels().lanes; }
};

class Scorer {
 public:
  Scorer(const specprefill_score& args, const specprefill_layer* layers, int64_t num_layers, int num_threads)
      : args_(args),
        layers_(layers),
        num_threads_(clamp_threads(num_threads)),
        pool_width_(pool_width(args.pool_kernel_size, args.max_len)) {
    for (int64_t i = 0; i < num_layers; ++i) head_dim_ = std::max(head_dim_, layers[i].head_dim);
    for (int64_t b = 0; b < args.batch; ++b) {
      blocks_ = std::max(blocks_, RowLanes(score_kernels().lanes, rows_of(args, b), 1).blocks);
    }
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
    for (int i = 0; i < num_threads_; ++i) Scratch(head_dim_, pool_width_, blocks_, count);
    *least = count.used() + largest + Arena::kAlign;
    *best = count.used() + std::max(largest, std::min(all, kWaveBytes)) + Arena::kAlign;
  }

  int run(Arena arena) {
    for (int i = 0; i < num_threads_; ++i) scratch_.emplace_back(head_dim_, pool_width_, blocks_, arena);
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
    item.group = layer.num_q_heads / layer.num_kv_heads;
    item.lanes = RowLanes(score_kernels().lanes, rows_of(args_, b), item.group);
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
                 layer.head_dim,
                 item.readable};
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

  // Packs an item's queries, and what each of its rows sees.
  void prepare(Item& item) {
    const specprefill_layer& layer = this->layer(item);
    const int64_t size = item.lanes.size(), bytes = item_bytes(layer.query_dtype);
    const float key_scale = layer.key_scale ? layer.key_scale[item.head * layer.key_scale_stride] : 1.0f;
    // Products come out as exponents of 2, or, with a soft cap, as the argument of its tanh.
    const double unit = args_.softcap != 0 ? 1.0 / args_.softcap : kLog2E;
    const float factor = static_cast<float>(static_cast<double>(layer.scale) * key_scale * unit);
    std::fill_n(item.query, size * layer.head_dim, 0.0f);
    std::fill_n(item.present, size, 0.0f);
    // Lanes without a row see what the first row does, so that they neither ask for a mask nor for a tile.
    std::fill_n(item.begin, size, static_cast<int32_t>(first_seen(item, layer, 0)));
    std::fill_n(item.end, size, static_cast<int32_t>(last_seen(item, 0) + 1));
    if (item.lse) std::fill_n(item.lse, size, 0.0f);
    for (int64_t m = 0; m < item.group * item.lanes.rows; ++m) {
      const int64_t n = m % item.lanes.rows, head = item.head * item.group + m / item.lanes.rows;
      const int64_t at = item.lanes.at(m / item.lanes.rows, n);
      const char* q =
          static_cast<const char*>(layer.query) +
          (item.b * layer.query_stride_batch + n * layer.query_stride_row + head * layer.query_stride_head) * bytes;
      for (int64_t d = 0; d < layer.head_dim; ++d) {
        item.query[d * size + at] = to_float(q + d * layer.query_stride_dim * bytes, layer.query_dtype) * factor;
      }
      item.present[at] = 1.0f;
      item.end[at] = static_cast<int32_t>(last_seen(item, n) + 1);
      item.begin[at] = static_cast<int32_t>(first_seen(item, layer, n));
      if (item.lse) {
        const float lse =
            layer.lse[item.b * layer.lse_stride_batch + n * layer.lse_stride_row + head * layer.lse_stride_head];
        item.lse[at] = static_cast<float>(lse * kLog2E);
      }
    }
  }

  int64_t position(const Item& item, int64_t n) const {
    return args_.queries == SPECPREFILL_LOOK_AHEAD ? item.length - 1 + n : item.length - item.lanes.rows + n;
  }
  int64_t last_seen(const Item& item, int64_t n) const { return std::min(position(item, n), item.readable - 1); }
  int64_t first_seen(const Item& item, const specprefill_layer& layer, int64_t n) const {
    return layer.window ? std::max<int64_t>(position(item, n) - layer.window + 1, 0) : 0;
  }

  ScoreTile tile_of(const Item& item, int64_t index, float* panel) const {
    const int64_t first = index * kTile, stats = index * item.lanes.size();
    return {item.keys,
            item.query,
            item.lanes.vectors,
            first,
            std::min(kTile, item.readable - first),
            item.begin,
            item.end,
            item.lse,
            static_cast<float>(args_.softcap * kLog2E),
            item.weights,
            item.maxima + stats,
            item.sums + stats,
            panel};
  }

  int normalize(Item& item) const {
    const int64_t bad = score_kernels().combine(item.maxima, item.sums, item.tiles, item.lanes.vectors, item.present,
                                                item.lse != nullptr);
    if (bad < 0) return SPECPREFILL_OK;
    int64_t m = 0;
    while (item.lanes.at(m / item.lanes.rows, m % item.lanes.rows) != bad) ++m;
    return fail(SPECPREFILL_NOT_FINITE,
                "%s of sequence %lld: expected finite attention weights, got NaN or Inf (layer %lld, query head %lld, "
                "look-ahead row %lld)",
                item.lse ? "lse, query or key" : "query or key", static_cast<long long>(item.b),
                static_cast<long long>(item.layer),
                static_cast<long long>(item.head * item.group + m / item.lanes.rows),
                static_cast<long long>(m % item.lanes.rows));
  }

  void fold(const Item* first, const Item* last) {
    const int64_t tiles = (args_.max_len + kTile - 1) / kTile;
    parallel_for(args_.batch * tiles, num_threads_, [&](int64_t task, int worker) {
      const int64_t b = task / tiles, start = task % tiles * kTile, length = prompt_length(args_, b);
      if (start < length) fold_tile(first, last, b, start, std::min(kTile, length - start), scratch_[worker]);
    });
  }

  // The maximum over the wave's heads and layers, pooled, into the state.
  void fold_tile(const Item* first, const Item* last, int64_t b, int64_t start, int64_t count, Scratch& scratch) {
    const int64_t length = prompt_length(args_, b);
    // By this prompt's length, not the batch's: the order of additions must be the one it has alone.
    const int64_t width = pool_width(args_.pool_kernel_size, length);
    const RowLanes lanes(score_kernels().lanes, rows_of(args_, b), 1);
    const int64_t stride = lanes.blocks * lanes.lanes;
    bool any = false;
    for (const Item* item = first; item != last; ++item) {
      if (item->b != b) continue;
      if (!any) std::fill_n(scratch.best, count * stride, 0.0f);
      any = true;
      for (int64_t v = 0; v < item->lanes.vectors; ++v) {
        const int64_t at = v * lanes.lanes;
        score_kernels().pool_max({item->weights + at, item->maxima + at, item->lanes.size(), length, start, count,
                                  width, scratch.window, scratch.sums},
                                 scratch.best + v % lanes.blocks * lanes.lanes, stride);
      }
    }
    if (!any) return;
    const bool valid_edge = args_.pool_edge == SPECPREFILL_POOL_VALID;
    score_kernels().fold(
        {args_.state + b * args_.state_stride_batch, args_.state_rows == 1 ? 0 : args_.state_stride_row, lanes.rows,
         lanes.padded, length, start, count, width, valid_edge ? 0.0f : static_cast<float>(args_.pool_kernel_size)},
        scratch.best);
  }

  const specprefill_score& args_;
  const specprefill_layer* layers_;
  int num_threads_;
  int64_t pool_width_;
  int64_t head_dim_ = 1;
  int64_t blocks_ = 1;  // vectors that a head's rows take, at most
  std::vector<Item> items_;
  std::vector<Scratch> scratch_;
};

}  // namespace

const ScoreKernels& score_kernels() { return SPECPREFILL_PICK(score_kernels); }

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
    item.lanes = RowLanes(score_kernels().lanes, look_ahead, group);
    item.readable = max_len + look_ahead - 1;
    Arena count;
    place(item, head_dim, true, count);
    for (int i = 0; i < clamp_threads(num_threads); ++i)
      Scratch(head_dim, pool_width(pool_kernel_size, max_len), item.lanes.blocks, count);
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
    const ScratchMemory memory(best);
    return scorer.run(Arena(memory.data(), best));
  });
}
