"""The server's half: `fl_lightning.fit`, whose clients are the nodes of this federation."""

from flwr.app import Context  # pyright: ignore[reportMissingImports]
from flwr.serverapp import Grid, ServerApp  # pyright: ignore[reportMissingImports]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds; the run folder holds what came of them."""
    from fl_lightning.deploy.flower import fit

    fit(grid, context.run_config)
