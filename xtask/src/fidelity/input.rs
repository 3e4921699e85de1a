//! What the programs work on: written new for each run, always the same.

use std::{fmt::Write, fs, path::Path};

use anyhow::{Context, Result};

const PYTHON: &str = "\
import json, re
items = [{'number': i, 'text': 'item %d' % i} for i in range(300)]
items = json.loads(json.dumps(items))
print(len(re.findall(r'item (\\d+)', json.dumps(items))), sum(item['number'] for item in items))
def fibonacci(n):
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)
class Node:
    def __init__(self, value):
        self.value, self.next = value, None
nodes = [Node(i) for i in range(1000)]
for one, other in zip(nodes, nodes[1:]):
    one.next = other
def fails(n):
    raise ValueError(n)
caught = 0
for i in range(100):
    try:
        fails(i)
    except ValueError:
        caught += 1
print(fibonacci(14), caught, sorted(set(str(i) for i in range(200)))[:3])
";

const PERL: &str = "\
my %h; my $s = 0;
for my $i (1 .. 4000) { my $k = \"key\" . ($i % 97); $h{$k} += $i; $s += length($k); }
my @w = sort { $h{$a} <=> $h{$b} || $a cmp $b } keys %h;
my $t = join(\",\", map { \"$_=$h{$_}\" } @w); $t =~ s/(\\d+)=/<$1>/g; my $n = () = $t =~ /<\\d+>/g;
for my $i (1 .. 50) { eval { die \"number $i\\n\" }; $s += length($@); }
printf \"%d %d %s\\n\", $s, $n, substr($t, 0, 40);
";

const AWK: &str = "\
{ sum += $1; count[$1 % 13]++; gsub(/7/, \"seven\"); bytes += length($0) }
END { for (i = 0; i < 13; i++) printf \"%d \", count[i]; print sum, bytes, sprintf(\"%.3f\", sqrt(sum)) }
";

/// Writes all inputs into `folder`.
pub(super) fn write(folder: &Path) -> Result<()> {
    let mut numbers = String::new();
    for number in 0..40_000_u64 {
        writeln!(numbers, "{} {number}", number.wrapping_mul(2_654_435_761) % 1_000_003)?;
    }
    let mut inserts = "create table t(a integer primary key, b text);\nbegin;\n".to_owned();
    for number in 0..10_000 {
        writeln!(inserts, "insert into t(b) values('row {}');", number * 7919 % 10_007)?;
    }
    inserts.push_str("commit;\nselect count(*), sum(a), max(b) from t;\n");
    inserts.push_str("select b, count(*) from t group by b order by b limit 5;\n");
    for (name, text) in [
        ("numbers.txt", numbers.as_str()),
        ("inserts.sql", &inserts),
        ("work.py", PYTHON),
        ("work.pl", PERL),
        ("work.awk", AWK),
    ] {
        fs::write(folder.join(name), text).with_context(|| format!("writing {name}"))?;
    }
    Ok(())
}
