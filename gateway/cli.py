"""`cairn`: start a stack, look at it, find out what is wrong with it; what is in its cache is in cache_cli.

Flags and printing only; the work is in gateway/launch/.  Nothing heavy is imported here: parts that need
torch, vLLM or the web stack run as processes of their own.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cacheengine.config import CONFIG_FILE_ENV
from gateway.cache_cli import cache_app
from gateway.keys_cli import keys_app
from gateway.launch import probe, state, status, worker
from gateway.launch.board import Board
from gateway.launch.config import DEFAULT_MODEL, LaunchConfig, load_settings
from gateway.launch.doctor import examine
from gateway.launch.errors import Commands
from gateway.launch.model import Model, prepare
from gateway.launch.stack import Stack

app = typer.Typer(
    cls=Commands,
    help="Prefill once, reuse everywhere: a KV-cache-aware gateway and cache for vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
model_app = typer.Typer(help="Model files.", no_args_is_help=True)
app.add_typer(cache_app)  # lookup, inspect, warm, pin, unpin, clear
app.add_typer(keys_app, name="keys")
app.add_typer(model_app, name="model")

ConfigFile = Annotated[str | None, typer.Option("--config", help="YAML file; flags and CAIRN_* win over it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
GatewayUrl = Annotated[str | None, typer.Option("--url", help="The gateway. Default: the running stack's.")]


@app.command()
def up(
    config: ConfigFile = None,
    model: Annotated[
        str | None, typer.Option(help="Directory, Hugging Face id, or nothing: the bundled one.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    workers: Annotated[int | None, typer.Option(help="vLLM workers to start.")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port of the gateway; workers take the following ones.")
    ] = None,
    host_bytes: Annotated[
        str | None, typer.Option(help="Host memory tier per worker, as 512MiB or 2GiB.")
    ] = None,
    disk_bytes: Annotated[str | None, typer.Option(help="Disk tier per worker, as 4GiB.")] = None,
    no_disk: Annotated[bool, typer.Option("--no-disk", help="No disk tier.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="vLLM's --dtype; float32 makes greedy output exact.")
    ] = None,
) -> None:
    """Start Valkey, vLLM workers and the gateway on this machine; Ctrl-C stops them all.

    An outside Redis is named by CAIRN_REDIS_URL: an environment variable, because it may hold a password.
    """
    settings = load_settings(
        config or os.environ.get(CONFIG_FILE_ENV),
        model=model,
        served_model_name=name,
        worker_count=workers,
        port=port,
        host_bytes=host_bytes,
        disk_bytes="0" if no_disk else disk_bytes,
        dtype=dtype,
    )
    console = Console(stderr=False)
    stack = Stack(settings, os.environ, Board(console))
    raise typer.Exit(stack.run(lambda ready: _greet(console, settings, ready)))


@app.command()
def gateway(
    config: ConfigFile = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    admin_port: Annotated[int | None, typer.Option(help="Port of the admin pages.")] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", "--workers", help="Processes that share the port.")
    ] = None,
) -> None:
    """Run the gateway alone, in front of workers that share its Redis (CAIRN_REDIS_URL) or are named to it.

    It reads CAIRN_* (CAIRN_REDIS_URL, CAIRN_WORKERS, CAIRN_POLICY …): see docs/config.md.
    """
    flags = {
        "config": config, "host": host, "port": port, "admin_port": admin_port, "processes": processes
    }  # fmt: skip
    os.execv(sys.executable, [sys.executable, "-m", "gateway.launch.serve", json.dumps(flags)])


@app.command("worker", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run_worker(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="Directory, Hugging Face id, or nothing: the bundled one.")
    ] = DEFAULT_MODEL,
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8001,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    url: Annotated[
        str, typer.Option(help="Under which the gateway reaches it. Default: from host and port.")
    ] = "",
    worker_id: Annotated[str, typer.Option(help="Stable name; names its disk folder too.")] = "w1",
    served_model_name: Annotated[str, typer.Option(help="What clients call the model.")] = "",
    dtype: Annotated[str, typer.Option(help="vLLM's --dtype.")] = "auto",
) -> None:
    """Run one vLLM worker with Cairn's cache inside.  Options it does not know go to vLLM as they are.

    The cache reads CAIRN_* (CAIRN_REDIS_URL, CAIRN_HOST_BYTES, CAIRN_DISK_PATH …): see docs/config.md.
    """
    ready = _prepare(model)
    spec = worker.WorkerSpec(
        model=str(ready.path),
        port=port,
        host=host,
        served_name=served_model_name or ready.name,
        dtype=dtype,
        cache={"worker_id": worker_id, "worker_url": url or f"http://{host}:{port}"},
        extra=tuple(context.args),
    )
    argv = worker.command(spec)
    os.execve(argv[0], list(argv), worker.environment(spec, os.environ))


@model_app.command("prepare")
def model_prepare(
    model: Annotated[str, typer.Argument(help="The bundled model, or a Hugging Face id.")] = DEFAULT_MODEL,
) -> None:
    """Make a model ready on this machine and print its directory."""
    typer.echo(_prepare(model).path)


@app.command("status")
def show_status(url: GatewayUrl = None, as_json: AsJson = False) -> None:
    """What the workers are doing and what they hold."""
    settings = load_settings()
    stack = state.read(settings.root)
    target = url or settings.admin_url or (stack.url if stack else settings.url)
    rows = status.summary(status.fetch_workers(target, settings.admin_token))
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)  # a pipe has no width of its own
    if rows:
        console.print(status.table(rows))
    else:
        console.print(f"{target} knows no worker yet")


@app.command("doctor")
def show_doctor(url: GatewayUrl = None, as_json: AsJson = False) -> None:
    """Check versions, compiler, Redis, disk, workers.  Exit code 1 when something cannot work."""
    settings = load_settings()
    stack = state.read(settings.root)
    target = url or settings.admin_url or (stack.url if stack else settings.url)
    redis_url = settings.redis_url or (stack.redis_url if stack else "")
    findings = examine(probe.gather(settings.root, target, redis_url, os.environ, settings.admin_token))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        report = Table(box=None, show_header=False, pad_edge=False)
        mark = {"ok": "[green]✓[/]", "warn": "[yellow]![/]", "fail": "[red]✗[/]"}
        for finding in findings:
            report.add_row(mark[finding.level], finding.what, finding.detail, f"[dim]{finding.fix}[/]")
        Console().print(report)
    raise typer.Exit(1 if any(finding.level == "fail" for finding in findings) else 0)


def _prepare(model: str) -> Model:
    return prepare(model, load_settings().root, lambda line: typer.echo(line, err=True))


def _greet(console: Console, config: LaunchConfig, model: Model) -> None:
    name = config.served_model_name or model.name
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}]})
    console.print(
        f"""
Cairn is up at {config.url} with {config.worker_count} worker(s) of {name}.  Ctrl-C stops everything.

  curl {config.url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{body}'

  from openai import OpenAI
  client = OpenAI(base_url="{config.url}/v1", api_key="none")
  reply = client.chat.completions.create(
      model="{name}",
      messages=[{{"role": "user", "content": "Hello"}}])
  print(reply.choices[0].message.content)

  {Path(sys.argv[0])} status    what the workers hold        logs: {config.root / "logs"}
  {Path(sys.argv[0])} doctor    what is wrong, if anything
""",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def main() -> None:
    app()


if __name__ == "__main__":
    main()
