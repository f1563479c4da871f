// sample_crops on the CPU. Work per row: Philox of four blocks where the first or second try fits, as nearly all do of a
// square image, two square roots and a quotient a try. Same bits for any number of threads.
#include "sample_crops.h"

#include "../common/for_samples.h"

namespace fastproto {

void sample_crops(const SampleCrops& args, int threads) { for_samples<sample_crop>(args, threads); }

}  // namespace fastproto
