"""Rewrite on a Ray cluster: an engine in every worker, a shard as the unit of work.

    pip install trl-offpolicy[ray]
    python examples/rewrite_ray.py --model_name_or_path Qwen/Qwen2.5-Math-1.5B --dataset_name openai/gsm8k --dataset_config main \\
        --output_dir /shared/gsm8k --num_shards 64 --num_workers 8 --num_gpus 1

Ray Data gives the next shard to whichever worker is free, starts a worker anew when it dies, and its shard with it: the journal
in `output_dir`, which all nodes must see, turns that into a resume. The driver may be killed as well: run it again. The
workers are our own because Ray's stages for language models return one of n samples and cannot stop attempts that a correct one
made obsolete.
"""

from dataclasses import dataclass, field, replace

from trl_offpolicy import DataRewriter, RewriteConfig
from trl_offpolicy.data.loading import load_rows


@dataclass
class RayArguments:
    """What is rewritten by what, in how many parts at a time."""

    model_name_or_path: str = field(metadata={"help": "Model that will be trained: Hub id or local directory."})
    dataset_name: str = field(metadata={"help": "Hub id, directory or file, as for `trl-offpolicy rewrite`."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split."})
    num_shards: int = field(
        default=8, metadata={"help": "Parts of the dataset; several for each worker even out the load."}
    )
    num_workers: int = field(default=2, metadata={"help": "Workers, each with an engine of its own."})
    num_gpus: float = field(default=0, metadata={"help": "GPUs of one worker."})


class ShardRewriter:
    """A worker: loads its engine once, then rewrites one shard after another."""

    def __init__(self, arguments: RayArguments, config: RewriteConfig):
        from trl_offpolicy import TransformersSampler

        self.arguments, self.config = arguments, config
        self.dataset = load_rows(arguments.dataset_name, arguments.dataset_config, arguments.dataset_split)
        self.sampler = TransformersSampler(arguments.model_name_or_path)  # or any other engine

    def __call__(self, row: dict) -> dict:
        shard = f"{row['id']}/{self.arguments.num_shards}"
        rewriter = DataRewriter(None, replace(self.config, shard=shard), sampler=self.sampler)
        rewriter.rewrite(self.dataset)
        return {"shard": shard, **rewriter.metrics["yield"]}


def main():
    import ray
    from trl import TrlParser

    arguments, config = TrlParser((RayArguments, RewriteConfig)).parse_args_and_config()
    if config.dry_run:
        raise ValueError("Dry runs are for `trl-offpolicy rewrite --dry_run`: they need no cluster.")
    print(config.output_dir, flush=True)
    ray.init()
    shards = ray.data.range(arguments.num_shards, override_num_blocks=arguments.num_shards)
    done = shards.map(
        ShardRewriter,
        fn_constructor_args=(arguments, config),
        # One shard at a time for each worker: what waits can still go to another one.
        compute=ray.data.ActorPoolStrategy(size=arguments.num_workers, max_tasks_in_flight_per_actor=1),
        num_gpus=arguments.num_gpus,
    )
    for row in done.iter_rows():
        print(row, flush=True)
    print(
        f"accelerate launch -m trl_offpolicy.cli sft --model_name_or_path {arguments.model_name_or_path} "
        f"--dataset_name {config.output_dir}/dataset --objective dft --output_dir {config.output_dir}-sft"
    )


if __name__ == "__main__":
    main()
