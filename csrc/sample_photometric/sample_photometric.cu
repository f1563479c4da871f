// sample_photometric on a GPU: one thread per row. 57 bytes are written a row, so the launch takes longer than the work.
#include "sample_photometric.h"

#include "../common/for_samples.h"

namespace fastproto {

void sample_photometric_cuda(const SamplePhotometric& args, uintptr_t stream) {
  for_samples_cuda<sample_colours>(args, stream, "sample_photometric");
}

}  // namespace fastproto
