"""The shape of Stable Diffusion's latents, without PyTorch."""

# Of a latent and of a picture; a latent's side is a picture's divided by this.
CHANNELS, IMAGE_CHANNELS = 4, 3
REDUCTION = 8
