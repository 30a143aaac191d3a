// Which lane of which vector holds which query row of a KV head.
//
// The rows that share a KV head lie in vectors, side by side, so that a key's element, broadcast, meets all of them at
// once: no key is transposed, and a row's maximum and sum over the tokens need no step across lanes. A vector holds the
// rows of as many whole heads as fit, or a head takes whole vectors: so the maximum over heads is one over vectors and,
// last, over parts of one.
#pragma once

#include <cstdint>

namespace specprefill {

struct RowLanes {
  int64_t lanes;    // per vector
  int64_t rows;     // look-ahead rows of one head
  int64_t padded;   // lanes that one head's rows take: `rows`, or whole vectors
  int64_t heads;    // heads per vector; 1 where a head takes whole vectors
  int64_t blocks;   // vectors per head; 1 where a vector holds whole heads
  int64_t vectors;  // of the whole group

  RowLanes() = default;
  RowLanes(int64_t lanes_of_vector, int64_t num_rows, int64_t group)
      : lanes(lanes_of_vector), rows(num_rows), padded(num_rows), heads(1), blocks(1) {
    if (rows > lanes) {
      blocks = (rows + lanes - 1) / lanes;
      padded = blocks * lanes;
    } else {
      heads = lanes / rows;
    }
    vectors = (group + heads - 1) / heads * blocks;
  }

  int64_t size() const { return vectors * lanes; }

  // Of look-ahead row n of the group's query head `head`. Ascending in (head, n).
  int64_t at(int64_t head, int64_t n) const { return head / heads * blocks * lanes + head % heads * padded + n; }
};

}  // namespace specprefill
