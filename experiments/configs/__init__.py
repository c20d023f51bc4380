"""A config for every published result; each changes only what its name says of DDPM's."""
