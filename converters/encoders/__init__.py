"""The image encoders whose checkpoints the converter knows: one module for each, found by its being here.

A module says, with NumPy alone:

    KIND                            what the model file calls the encoder
    BATCH_NORM_EPSILON              of its BatchNorms, which no checkpoint tells
    DECODER_NORM_EPSILON            of the LayerNorms in the decoder that it is trained with
    recognises(shapes)              whether {name: shape} has its keys
    infer_config(shapes, side)      its configuration: "image_encoder" of the model file; `side` is that of its
                                    input where the caller knows it, None otherwise
    input_policy(config)            how an image and prompts become its input: "input" of the model file
    model_name(config)              what people call a model with it
    expected_shapes(config, folded) {name: shape} of its tensors, in which the convolutions `folded` have a bias
                                    and no BatchNorm
    IGNORED                         a pattern of keys that checkpoints have and nobody needs, or None

Names begin with "image_encoder." everywhere.
"""

import importlib
import pkgutil

KNOWN = {
    module.KIND: module
    for module in (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
}
