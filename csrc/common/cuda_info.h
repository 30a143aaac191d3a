// Which GPUs a build has code for.
#pragma once

namespace specprefill {

// Whether one of `architectures`, as in "sm_80 sm_90 compute_120", runs on a GPU of this compute capability: binaries
// on later minor versions of their own major one, PTX on everything later. A word of another form is taken to run. A
// status, with a message if none does.
int check_capability(const char* architectures, int major, int minor);

}  // namespace specprefill
