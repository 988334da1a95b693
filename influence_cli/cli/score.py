"""influence score: ranked proponents and opponents per query."""

import dataclasses
from collections import deque

from influence_cli.cli import command, options
from influence_cli.methods.table import METHODS


@command(
    "score", example="influence score my_run --queries 0:5 --top 3 | column -s, -t", ranks=True
)
def score(
    shared: options.Shared,
    shown: options.Shown,
    words: options.Words,
    values: options.Values,
    method: options.Method = "tracin",
    queries: options.Queries = None,
    train: options.Train = None,
    shard: options.Shard = None,
    sum_queries: options.SumQueries = False,
    group_by: options.GroupBy = None,
    by: options.By = None,
    lr: options.Lr = None,
    lr_weights: options.LrWeights = None,
    normalize: options.Normalize = False,
    trajectory: options.Trajectory = None,
) -> None:
    """Which training examples lowered each query's loss (proponents), and which raised it (opponents)?

    Missing gradients are computed and cached first; a stopped run goes on where it was. Score above 0: proponent.
    """
    from influence_cli.cli import specs
    from influence_cli.errors import UsageProblem
    from influence_cli.output import tables

    chosen = METHODS[specs.one_of("--method", method, METHODS)]
    sink = tables.TableWriter.open(shown.format, shown.output)
    k = specs.top(shown.top)
    specs.check_stdin(queries, train)
    part = specs.shard(shard)
    if by is not None and by not in chosen.parts:
        raise UsageProblem(
            f"--by {by}: the scores of {method} have no such parts",
            f"expected: {', '.join(chosen.parts)}",
        )
    if not chosen.weighted and (lr is not None or lr_weights is not None):
        raise UsageProblem(
            f"--method {method} has no learning-rate weights",
            "leave out --lr and --lr-weights, or use --method tracin",
        )

    specs.check_words(method, chosen.words, words, shared.layers)
    specs.check_values(method, chosen.curvatures, values, normalize)
    specs.check_projected(method, chosen, shared.project)
    specs.check_shard(part, method, chosen, group_by)
    if by == "word" and group_by:
        raise UsageProblem(
            "--by word splits pairs of texts, --group-by sums over them", "give one of them"
        )

    from influence_cli.cli.opening import open_shared
    from influence_cli.methods.declaration import WordOptions
    from influence_cli.methods.request import ScoreRequest
    from influence_cli.output.ranking import FullRanking, Ranking, TopRanking
    from influence_cli.run.learning_rates import weigh_checkpoints

    opened = open_shared(shared, trajectory)
    selected = opened.checkpoints
    if chosen.checkpoints == "one":
        if shared.steps is not None and len(selected) > 1:
            raise UsageProblem(
                f"--method {method} reads one checkpoint, --steps {shared.steps} selects {len(selected)}",
                "name one step",
            )
        selected = selected[-1:]
    train_ids = opened.train_ids(train, part)
    if not len(train_ids):  # an empty shard
        sink.write([], tables.score_columns(by))
        return
    question = ScoreRequest(
        checkpoints=selected,
        weights=opened.weights(lr, lr_weights)
        if chosen.weighted
        else tuple(weigh_checkpoints(selected, None, "none")),
        columns=opened.embedding(words.embedding) if chosen.words else opened.columns,
        train=train_ids,
        queries=opened.ids("--queries", queries, "query"),
        sum_queries=sum_queries,
        normalize=normalize or chosen.normalized,
        by=by,
        groups=opened.groups(group_by, train_ids) if group_by else None,
        words=WordOptions(words.special_tokens, words.pad_id, words.top_words, words.synonyms or 0)
        if chosen.words
        else None,
        values=chosen.options(**dataclasses.asdict(values)),
    )
    names = question.groups.names if question.groups else None

    def new_ranking(width: int, parts: int) -> Ranking:
        return TopRanking(width, parts, k) if k is not None else FullRanking(width, parts)

    rows = (
        row
        for answer in chosen.score()(opened.gradients, question, new_ranking)
        for row in tables.score_rows(
            answer.ranking, answer.queries, by, answer.parts, names, opened.describe, answer.split
        )
    )
    ranks = opened.ranks
    if not chosen.ordered and ranks.rank:
        deque(rows, maxlen=0)  # do this rank's share of the work; rank 0 has the rows
    elif not chosen.ordered or ranks.count == 1:
        sink.write(rows, tables.score_columns(by))
    elif ranks.rank:
        opened.gradients.serve()
    else:
        opened.reporter.note(
            f"{method}: what is cached is captured by all {ranks.count} ranks; training is gone back over by rank 0 alone"
        )
        with opened.gradients.serving():
            sink.write(rows, tables.score_columns(by))
    ranks.close()
