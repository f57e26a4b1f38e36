"""The embedded default's data: procedural scenes, the oracle that reads them, their autoencoder, their text encoder."""
