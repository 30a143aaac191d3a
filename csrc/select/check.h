// What can be wrong with the arguments of a selection, and what follows from its sizes and budget.
#pragma once

#include "specprefill.h"

namespace specprefill {

// As in ops/select/budget.py: a ratio is a whole number of units, a product within the slack (1e-9 per chunk) of an
// integer counts as that integer ...
constexpr int64_t kRatioUnits = 1000000000000, kRatioSlack = 1000;
// ... and a mass this close to the wanted fraction is enough.
constexpr double kMassSlack = 1e-9;

// What the width of a selection follows from.
int check_budget(const specprefill_select& args);

// All that can be seen without reading what the pointers point to.
int check_select(const specprefill_select& args);

// Each of select_tokens' three calls, and that they are about one batch and each one's result is the next one's input.
// gather: or NULL.
int check_select_tokens(const specprefill_finalize& finalize, const specprefill_select& select,
                        const specprefill_gather_tokens* gather);

// Chunks to keep of `chunks`, at least 1; all of them for a budget by mass, whose count follows the contents.
int64_t budget_chunks(const specprefill_select& args, int64_t chunks);

// Tokens that any selection of these arguments fits into.
int64_t selection_width(const specprefill_select& args);

}  // namespace specprefill
