// Prints the five best classes of a picture, a PPM file with 8 bits (P6). docs/deploy.md says how to compile this.
#include <dsr.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

static int fail(const char *why) { return std::fprintf(stderr, "classify: %s\n", why), 1; }

int main(int argc, char **argv) {
    if (argc != 3) return fail("give a plan and a picture: classify model.dsrplan picture.ppm");
    dsr_plan *plan = dsr_open(argv[1], 1);
    if (!plan) return fail(dsr_last_error());
    dsr_tensor x = dsr_input(plan, 0), y = dsr_output(plan, 0);
    const bool fits = x.rank == 4 && x.shape[0] == 1 && x.shape[1] == 3 && y.rank == 2;
    if (!fits) return fail("the plan is not for one picture of three channels; export a classifier with --batch 1");
    std::ifstream file(argv[2], std::ios::binary);
    std::string magic;
    int width = 0, height = 0, most = 0;
    file >> magic >> width >> height >> most;
    const bool known = magic == "P6" && most == 255 && std::min(width, height) > 0 && std::max(width, height) < 20000;
    if (!known) return fail("the picture is no PPM file with 8 bits; convert it, and leave comments out of its head");
    std::vector<unsigned char> rgb(3 * (size_t)width * height);
    if (!file.ignore().read((char *)rgb.data(), rgb.size())) return fail("the picture is cut off");
    // The short side is resized to `resize`, and the centre is cut out. (Smooth a large picture before, as PIL does.)
    const int rows = x.shape[2], columns = x.shape[3], resize = std::stoi(dsr_text(plan, "resize"));
    const float scale = std::min(width, height) / (float)(resize ? resize : std::min(rows, columns));
    std::vector<float> pixels(3 * rows * columns), scores(y.shape[1]);
    std::istringstream means(dsr_text(plan, "mean")), deviations(dsr_text(plan, "std"));
    for (int c = 0; c < 3; c++) {
        float mean = 0, deviation = 1;
        means >> mean, deviations >> deviation;
        const auto at = [&](int r, int k) {
            return rgb[3 * (std::clamp(r, 0, height - 1) * (size_t)width + std::clamp(k, 0, width - 1)) + c] / 255.f;
        };
        for (int i = 0; i < rows * columns; i++) {
            const float v = (i / columns + 0.5f - rows / 2.f) * scale + height / 2.f - 0.5f, r = std::floor(v);
            const float u = (i % columns + 0.5f - columns / 2.f) * scale + width / 2.f - 0.5f, k = std::floor(u);
            const float upper = at(r, k) + (u - k) * (at(r, k + 1) - at(r, k));
            const float lower = at(r + 1, k) + (u - k) * (at(r + 1, k + 1) - at(r + 1, k));
            pixels[c * rows * columns + i] = (upper + (v - r) * (lower - upper) - mean) / deviation;
        }
    }
    x.data = pixels.data(), y.data = scores.data();
    if (dsr_run(plan, &x, 1, &y, 1)) return fail(dsr_last_error());
    float total = 0, highest = *std::max_element(scores.begin(), scores.end());
    for (float &score : scores) total += score = std::exp(score - highest);
    for (size_t i = 0; i < 5 && i < scores.size(); i++) {
        const int best = std::max_element(scores.begin(), scores.end()) - scores.begin();
        const char *label = dsr_text(plan, ("label/" + std::to_string(best)).c_str());
        std::printf("%.4f  %d  %s\n", scores[best] / total, best, label ? label : "");
        scores[best] = -1;
    }
    dsr_close(&plan);
}
