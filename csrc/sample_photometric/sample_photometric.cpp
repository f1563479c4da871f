// sample_photometric on the CPU. Work per row: Philox of three blocks, four where something may be solarised. Same bits for
// any number of threads.
#include "sample_photometric.h"

#include "../common/for_samples.h"

namespace fastproto {

void sample_photometric(const SamplePhotometric& args, int threads) { for_samples<sample_colours>(args, threads); }

}  // namespace fastproto
