#pragma once

#include <kernels/macros_off.hpp>

#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <microtome/models/efficientvit.hpp>
#include <microtome/models/tiny_vit.hpp>

namespace microtome {

/// The image encoders that there are: one row for each. An encoder is a class with
///
///     static constexpr const char* kind         what the model file calls it
///     Encoder(weights, config_reader, padding)  reads its configuration, "image_encoder" in the
///                                               file, and the weights below that name
///     index_t image_size()                      side of its square input
///     map_size embedding_size()                 of its output
///     index_t embed_dim()                       channels of its output
///     void operator()(workspace&, view<const float> image, view<float> embedding)
///     index_t memory()                          floats of the arena that this takes
///     std::size_t scratch_bytes()               bytes of scratch that each thread takes
///     index_t macs()                            multiply-adds that have to be done
///     std::vector<std::string> parts()          what it is made of, for people
using encoder_types = std::variant<  //
    tiny_vit,                        // MobileSAM, LiteMedSAM
    efficientvit                     // EfficientViT-SAM L0 to XL1
    >;

/// An image encoder of any kind, chosen by the model file.
class image_encoder {
  template <class Function>
  decltype(auto) with(Function&& f) const {
    return std::visit(std::forward<Function>(f), encoder_);
  }

public:
  image_encoder(const weights& file, const config_reader& json, padding mode)
      : encoder_(choose(file, json, mode)) {}

  index_t image_size() const {
    return with([](const auto& encoder) { return encoder.image_size(); });
  }
  map_size embedding_size() const {
    return with([](const auto& encoder) { return encoder.embedding_size(); });
  }
  index_t embed_dim() const {
    return with([](const auto& encoder) { return encoder.embed_dim(); });
  }
  index_t memory() const {
    return with([](const auto& encoder) { return encoder.memory(); });
  }
  std::size_t scratch_bytes() const {
    return with([](const auto& encoder) { return encoder.scratch_bytes(); });
  }
  /// Multiply-adds that have to be done: on the tokens that exist, without padding. Twice as many
  /// FLOPs.
  index_t macs() const {
    return with([](const auto& encoder) { return encoder.macs(); });
  }
  std::string kind() const {
    return with([](const auto& encoder) {
      return std::string(std::remove_cvref_t<decltype(encoder)>::kind);
    });
  }
  std::vector<std::string> parts() const {
    return with([](const auto& encoder) { return encoder.parts(); });
  }

  /// image (image_size^2, 3), normalised -> embedding (embedding_size().tokens(), embed_dim).
  void operator()(workspace& ws, view<const float> image, view<float> embedding) const {
    with([&](const auto& encoder) { encoder(ws, image, embedding); });
    ws.record("image_embedding", embedding, layout::pixels, embedding_size().width);
  }

private:
  template <std::size_t Row = 0>
  static encoder_types choose(const weights& file, const config_reader& json, padding mode) {
    using encoder = std::variant_alternative_t<Row, encoder_types>;
    if (json.text("kind") == encoder::kind)
      return encoder_types(std::in_place_index<Row>, file, json, mode);
    if constexpr (Row + 1 < std::variant_size_v<encoder_types>)
      return choose<Row + 1>(file, json, mode);
    else
      json.refuse("kind is '", json.text("kind"), "', expected one of: ", kinds());
  }

  static std::string kinds() {
    return []<std::size_t... Row>(std::index_sequence<Row...>) {
      std::string names;
      ((names.append(Row ? ", " : "").append(std::variant_alternative_t<Row, encoder_types>::kind)),
       ...);
      return names;
    }
    (std::make_index_sequence<std::variant_size_v<encoder_types>>());
  }

  encoder_types encoder_;
};

}  // namespace microtome

#include <kernels/macros_on.hpp>
