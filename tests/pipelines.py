"""Tiny random pipelines in the folder layouts of diffusers, as `save_pretrained` writes them."""
# mypy: disable-error-code="no-untyped-call"

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeliosDMDScheduler,
    HeliosPipeline,
    HeliosPyramidPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
    I2VGenXLUNet,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MotionAdapter,
    PriorTransformer,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    StableVideoDiffusionPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetSpatioTemporalConditionModel,
    UniPCMultistepScheduler,
    VQModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WIDTH = 8  # of text features
LETTERS = "abcdefghijklmnopqrstuvwxyz"
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def clip_tokenizer(folder: Path) -> Any:
    """A tokenizer that reads letters, from the two files of the published ones."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def _clip_text(projected: bool = False, width: int = WIDTH) -> Any:
    config = CLIPTextConfig(
        vocab_size=60, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=width, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def _vae(**more: Any) -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, **blocks, **more)


def _unet2d(**more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, **{"cross_attention_dim": WIDTH, **more},
    )  # fmt: skip


def modelscope(folder: Path) -> Path:
    """ModelScope's layout; its pipeline class is deprecated, so the parts are saved one by one."""
    torch.manual_seed(0)
    unet = UNet3DConditionModel(
        sample_size=8, block_out_channels=(32, 32), norm_num_groups=4, layers_per_block=1, cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=8,
    )  # fmt: skip
    parts = {
        "unet": unet,
        "vae": _vae(),
        "text_encoder": _clip_text(),
        "scheduler": DDIMScheduler(**STABLE, clip_sample=False, set_alpha_to_one=False),
    }
    return _parts(folder, "TextToVideoSDPipeline", parts)


def stable_diffusion(folder: Path) -> Path:
    """Stable Diffusion 1.5's layout, less its safety checker."""
    torch.manual_seed(1)
    StableDiffusionPipeline(
        vae=_vae(), text_encoder=_clip_text(), tokenizer=clip_tokenizer(folder / "words"), unet=_unet2d(),
        scheduler=DDIMScheduler(**STABLE, clip_sample=False), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def motion_adapter(folder: Path) -> Path:
    """A motion adapter on its own, as AnimateDiff is published."""
    torch.manual_seed(2)
    adapter = MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2,
        use_motion_mid_block=True,
    )  # fmt: skip
    for parameter in adapter.parameters():  # the last layer of every motion module starts at zero
        torch.nn.init.normal_(parameter, std=0.2)
    adapter.save_pretrained(folder)
    return folder


def sdxl(folder: Path) -> Path:
    """SDXL's layout: two text encoders, their features side by side."""
    torch.manual_seed(3)
    unet = _unet2d(
        cross_attention_dim=2 * WIDTH, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=WIDTH + 6 * 4, transformer_layers_per_block=1,
    )  # fmt: skip
    tokenizer = clip_tokenizer(folder / "words")
    StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=_clip_text(), text_encoder_2=_clip_text(projected=True), tokenizer=tokenizer,
        tokenizer_2=tokenizer, unet=unet, scheduler=EulerDiscreteScheduler(**STABLE),
        add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _prior() -> PriorTransformer:
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=4, num_layers=1, embedding_dim=WIDTH, num_embeddings=16,
        additional_embeddings=4,
    )  # fmt: skip
    prior.clip_std = torch.nn.Parameter(torch.ones(1, WIDTH))
    return prior


def kandinsky_prior(folder: Path) -> Path:
    """Kandinsky 2.2's prior: text to image embeddings."""
    torch.manual_seed(6)
    KandinskyV22PriorPipeline(
        prior=_prior(), image_encoder=_eyes(), text_encoder=_clip_text(projected=True),
        tokenizer=clip_tokenizer(folder / "words"), scheduler=UnCLIPScheduler(prediction_type="sample"),
        image_processor=CLIPImageProcessor(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def kandinsky_decoder(folder: Path) -> Path:
    """Kandinsky 2.2's decoder: image embeddings to a picture."""
    torch.manual_seed(7)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=8, addition_embed_type="image", encoder_hid_dim_type="image_proj",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), block_out_channels=(8, 16),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", layers_per_block=1, encoder_hid_dim=WIDTH, norm_num_groups=4,
        cross_attention_dim=WIDTH, attention_head_dim=4, resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    movq = VQModel(
        block_out_channels=[32, 32], down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=4, layers_per_block=1,
        norm_num_groups=8, norm_type="spatial", num_vq_embeddings=12, up_block_types=["UpDecoderBlock2D"] * 2,
        vq_embed_dim=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(**STABLE, clip_sample=False)
    KandinskyV22Pipeline(unet=unet, scheduler=scheduler, movq=movq).save_pretrained(folder)
    return folder


def unclip(folder: Path) -> Path:
    """The layout of the published unCLIP: prior, decoder and two enlargers in one folder, some of its own classes."""
    torch.manual_seed(8)
    decoder = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=6, class_embed_type="identity", cross_attention_dim=WIDTH,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), block_out_channels=(8, 16),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", layers_per_block=1, attention_head_dim=4, norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    enlargers = [
        UNet2DModel(
            sample_size=16, in_channels=6, out_channels=3, block_out_channels=(8, 8), layers_per_block=1,
            norm_num_groups=4, down_block_types=("ResnetDownsampleBlock2D",) * 2,
            up_block_types=("ResnetUpsampleBlock2D",) * 2,
        )
        for _ in range(2)
    ]  # fmt: skip
    project = UnCLIPTextProjModel(
        clip_extra_context_tokens=2, clip_embeddings_dim=WIDTH, time_embed_dim=32, cross_attention_dim=WIDTH
    )
    schedulers = {
        "prior_scheduler": UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample"),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range"),
        "super_res_scheduler": UnCLIPScheduler(variance_type="fixed_small_log"),
    }
    parts: dict[str, Any] = {
        "prior": _prior(), "decoder": decoder, "text_encoder": _clip_text(projected=True), "text_proj": project,
        "super_res_first": enlargers[0], "super_res_last": enlargers[1], **schedulers,
    }  # fmt: skip
    parts["tokenizer"] = clip_tokenizer(folder / "tokenizer")
    libraries = {name: type(part).__module__.partition(".")[0] for name, part in parts.items()}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {name: [libraries[name], type(part).__name__] for name, part in parts.items()}
    index["text_proj"][0] = "unclip"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "UnCLIPPipeline"} | index))
    return folder


def dit(folder: Path) -> Path:
    """A folder that `train dit` wrote, among others: a small transformer on the demo's codec and text encoder."""
    from streamt2v.models.dit import SpacetimeConfig, SpacetimeTransformer
    from streamt2v.models.vae import AutoencoderConfig
    from streamt2v.models.vae import AutoencoderKL as Codec
    from streamt2v.training import bundle
    from streamt2v.training.world.encoders import build_text

    torch.manual_seed(9)
    network = SpacetimeTransformer(SpacetimeConfig(width=24, depth=2, heads=2))
    for parameter in network.parameters():  # a fresh one predicts nothing
        torch.nn.init.normal_(parameter, std=0.2)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = bundle.write_words(folder)
    bundle.write(folder, "dit", network)
    bundle.write(folder, "vae", Codec(AutoencoderConfig(block_out_channels=(8, 8, 8, 8), norm_num_groups=4)))
    bundle.write(folder, "text", build_text(len(tokenizer)))
    bundle.write_base(folder, "dit")
    return folder


def _eyes() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=WIDTH,
            image_size=224, patch_size=56,
        )
    )  # fmt: skip


def svd(folder: Path) -> Path:
    """SVD-XT's layout; it was made for more frames than a chunk has."""
    torch.manual_seed(4)
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=8, block_out_channels=(32, 32), layers_per_block=1, num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=WIDTH,
        projection_class_embeddings_input_dim=12, addition_time_embed_dim=4, num_frames=18,
    )  # fmt: skip
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1
    )
    euler = EulerDiscreteScheduler(
        prediction_type="v_prediction", use_karras_sigmas=True, timestep_type="continuous", sigma_min=0.002,
        sigma_max=700.0, timestep_spacing="leading", steps_offset=1, interpolation_type="linear",
    )  # fmt: skip
    StableVideoDiffusionPipeline(
        vae=vae, image_encoder=_eyes(), unet=unet, scheduler=euler, feature_extractor=CLIPImageProcessor()
    ).save_pretrained(folder)
    return folder


def i2vgen(folder: Path) -> Path:
    """I2VGen-XL's layout; its pipeline class is deprecated, so the parts are saved one by one."""
    torch.manual_seed(9)
    unet = I2VGenXLUNet(
        sample_size=8, block_out_channels=(32, 64), norm_num_groups=4, layers_per_block=1, cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=8,
    )  # fmt: skip
    cosine = {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True, "timestep_spacing": "leading"}
    return _parts(folder, "I2VGenXLPipeline", {
        "unet": unet, "vae": _vae(), "text_encoder": _clip_text(), "image_encoder": _eyes(),
        "feature_extractor": CLIPImageProcessor(),
        "scheduler": DDIMScheduler(**cosine, steps_offset=1, prediction_type="v_prediction", clip_sample=False),
    })  # fmt: skip


def _parts(folder: Path, pipeline: str, parts: dict[str, Any]) -> Path:
    parts["tokenizer"] = clip_tokenizer(folder / "tokenizer")
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {name: [type(part).__module__.partition(".")[0], type(part).__name__] for name, part in parts.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline} | index))
    (folder / "tokenizer" / "tokenizer.json").unlink()  # which the published folders do not have
    return folder


def _reads_letters() -> tuple[Any, Any]:
    """A tokenizer of letters and a T5 encoder."""
    numbers = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *LETTERS])}
    words = Tokenizer(models.WordLevel(numbers, "<unk>"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=128
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=40, d_model=WIDTH, d_kv=4, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
        )
    )  # fmt: skip
    return tokenizer, t5


def wan_vae(cell: int = 16) -> AutoencoderKLWan:
    """The codec of Wan: with cells of 16 pixels that of 2.2 TI2V, of 8 pixels that of 2.1."""
    more: dict[str, Any] = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
    return AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1, scale_factor_spatial=cell,
        latents_mean=[0.1] * 8, latents_std=[0.7] * 8, **(more if cell == 16 else {}),
    )  # fmt: skip


def wan_transformer() -> WanTransformer3DModel:
    """The transformer of Wan."""
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=8, out_channels=8, text_dim=WIDTH, freq_dim=8,
        ffn_dim=16, num_layers=1, rope_max_seq_len=64,
    )  # fmt: skip


def multistep() -> UniPCMultistepScheduler:
    """The scheduler of Wan 2.1."""
    return UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)


def wan(folder: Path, expand: bool = True) -> Path:
    """Wan's layout: 2.2 TI2V 5B, which takes a time for each token; or 2.1 from text, with a multistep solver."""
    torch.manual_seed(9)
    tokenizer, t5 = _reads_letters()
    WanPipeline(
        tokenizer=tokenizer, text_encoder=t5, transformer=wan_transformer(), vae=wan_vae(16 if expand else 8),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0) if expand else multistep(), expand_timesteps=expand,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def wan_from_text(folder: Path) -> Path:
    """Wan 2.1's layout."""
    return wan(folder, expand=False)


def helios_parts(pyramid: bool) -> dict[str, Any]:
    """The networks of Helios, without text."""
    transformer = HeliosTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=8, out_channels=8, text_dim=WIDTH, freq_dim=8,
        ffn_dim=16, num_layers=1, rope_dim=(4, 6, 6),
    )  # fmt: skip
    scheduler = HeliosDMDScheduler() if pyramid else HeliosScheduler(stages=1, stage_range=[0, 1])
    return {"transformer": transformer.eval(), "vae": wan_vae(8).eval(), "scheduler": scheduler}


def helios(folder: Path, pyramid: bool = False) -> Path:
    """Helios' layout: the base, or the distilled pyramid."""
    torch.manual_seed(10)
    tokenizer, t5 = _reads_letters()
    kind: Any = HeliosPyramidPipeline if pyramid else HeliosPipeline
    more = {"is_distilled": True} if pyramid else {}
    kind(tokenizer=tokenizer, text_encoder=t5, **helios_parts(pyramid), **more).save_pretrained(folder)
    return folder


def helios_distilled(folder: Path) -> Path:
    """The layout of the distilled one."""
    return helios(folder, pyramid=True)


def ltx_parts() -> dict[str, Any]:
    """The networks of LTX, without text."""
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=1, caption_channels=WIDTH,
    )  # fmt: skip
    packed = (True, True, False, False)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=packed,
        decoder_spatio_temporal_scaling=packed, decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4, timestep_conditioning=False, patch_size=1, patch_size_t=1,
    )  # fmt: skip
    return {"transformer": transformer, "vae": vae, "scheduler": FlowMatchEulerDiscreteScheduler()}


def ltx(folder: Path, pipeline: Any = LTXPipeline) -> Path:
    """LTX's layout: a diffusion transformer, a VAE that packs frames together, a T5 text encoder."""
    torch.manual_seed(5)
    tokenizer, t5 = _reads_letters()
    pipeline(tokenizer=tokenizer, text_encoder=t5, **ltx_parts()).save_pretrained(folder)
    return folder


def ltx_from_picture(folder: Path) -> Path:
    """The same networks as an image-to-video pipeline with text."""
    return ltx(folder, LTXImageToVideoPipeline)
