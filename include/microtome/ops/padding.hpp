#pragma once

namespace microtome {

/// What the windows at the right and bottom borders of a map do about the tokens they lack.
enum class padding {
  exact,    ///< as if the map were padded with zeros to whole windows, as TinyViT is trained
  dropped,  ///< attend among the tokens that exist, as nested tensors do
  padded    ///< the same as exact, by computing the padding: to compare with
};

}  // namespace microtome
